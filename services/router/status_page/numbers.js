// SPDX-License-Identifier: Apache-2.0
// What the cluster as a whole does: six figures, those that move with a line of the last three minutes.
import { element, humanCount, setText } from "./dom.js";

const kSamples = 180;
const kSvg = "http://www.w3.org/2000/svg";

class Figure {
  constructor(list, title, unit, hasLine) {
    this.value = element("span", {}, "–");
    const figure = element("dd", {}, this.value);
    if (unit) figure.append(" ", element("small", {}, unit));
    const box = element("div", {}, element("dt", {}, title), figure);
    if (hasLine) {
      this.samples = [];
      this.path = document.createElementNS(kSvg, "path");
      const svg = document.createElementNS(kSvg, "svg");
      svg.setAttribute("class", "spark");
      svg.setAttribute("viewBox", `0 0 ${kSamples} 30`);
      svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("aria-hidden", "true"); // the figure beside it says the same
      svg.append(this.path);
      figure.append(svg);
    }
    list.append(box);
  }

  // Without a sample the line has a gap there.
  set(text, sample = null) {
    setText(this.value, text);
    this.add(sample);
  }

  add(sample) {
    if (!this.samples) return;
    this.samples.push(sample);
    if (this.samples.length > kSamples) this.samples.shift();
    const top = Math.max(1, ...this.samples);
    const from = kSamples - this.samples.length;
    this.path.setAttribute("d", this.samples.map((value, i) => (value === null ? ""
      : `${(this.samples[i - 1] ?? null) === null ? "M" : "L"}${from + i} ${(28 - 26 * value / top).toFixed(1)}`)).join(""));
  }
}

export class Numbers {
  constructor(list) {
    this.out = new Figure(list, "Tokens drawn", "a second", true);
    this.in = new Figure(list, "Prompt tokens", "a second", true);
    this.running = new Figure(list, "Requests running", "", true);
    this.queued = new Figure(list, "Waiting for a place", "", true);
    this.pages = new Figure(list, "Decode pages in use", "", true);
    this.busy = new Figure(list, "Workers ready", "", false);
  }

  // A second of which nothing is known: the figures stay, the lines do not go on as if it had been seen.
  skip() {
    for (const figure of [this.out, this.in, this.running, this.queued, this.pages]) figure.add(null);
  }

  // `rates`: tokens a second by worker name, empty at the first answer.
  show(status, rates) {
    const { workers, open_generations: open, queued_generations: queued } = status.cluster;
    const of = (role) => workers.filter((worker) => worker.role === role);
    const sum = (list, value) => list.reduce((total, one) => total + value(one), 0);
    const rate = (role) => sum(of(role), (worker) => rates.get(worker.name) ?? 0);
    if (rates.size > 0) {
      this.out.set(humanCount(rate("decode")), rate("decode"));
      this.in.set(humanCount(rate("prefill")), rate("prefill"));
    } else {
      this.out.set("–");
      this.in.set("–");
    }
    this.running.set(open - queued, open - queued);
    this.queued.set(queued, queued);
    const total = sum(of("decode"), (worker) => worker.pages_total);
    const used = total - sum(of("decode"), (worker) => (worker.pages_total ? worker.pages_free : 0));
    this.pages.set(total ? `${Math.round(100 * used / total)} %` : "–", total ? 100 * used / total : 0);
    this.busy.set(`${workers.filter((worker) => worker.state === "ready" && !worker.suspect).length} of ${workers.length}`);
  }
}
