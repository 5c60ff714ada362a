# SPDX-License-Identifier: Apache-2.0
"""What a router's gRPC ports make of bytes that no gRPC library would send.

A client of our own speaks HTTP/2 frame by frame (RFC 9113, 9112's HPACK without Huffman coding). After every attack the
router is the same process, and answers a good call on a new connection.
"""
import gzip
import os
import signal
import socket
import struct
import time
import unittest

from cluster import Cluster, wait_until

OK, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 3, 8, 12, 13
RESET, ENDED = -1, -2  # of a stream, of its connection
# For a payload that it cannot read gRPC 1.51's callback API says UNIMPLEMENTED, other versions INTERNAL.
UNREADABLE = (INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL, RESET)
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
ENHANCE_YOUR_CALM = 11
TOKENIZE = "/millrace.v1.Inference/Tokenize"
MAX_PUBLIC_BYTES, MAX_INTERNAL_BYTES = 16 << 20, 64 << 20


def integer(value, prefix_bits, first=0):
    """HPACK's integers: what fits in the prefix, or seven bits a byte behind it."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes([first | value])
    encoded, value = [first | limit], value - limit
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    return bytes(encoded + [value])


def header(name, value):
    name, value = name.encode(), value if isinstance(value, bytes) else value.encode()
    return b"\x00" + integer(len(name), 7) + name + integer(len(value), 7) + value


def request_headers(path, *more, leave_out=()):
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"), ("te", "trailers"),
              ("content-type", "application/grpc"), *more]
    return b"".join(header(name, value) for name, value in fields if name not in leave_out)


def message(body, compressed=0, length=None):
    return struct.pack(">BI", compressed, len(body) if length is None else length) + body


def field(number, wire_type, payload):
    return integer_bytes(number << 3 | wire_type) + payload


def integer_bytes(value):
    """Protocol Buffers' varint."""
    encoded = b""
    while value >= 128:
        encoded += bytes([value % 128 + 128])
        value //= 128
    return encoded + bytes([value])


def text(value):
    """A TokenizeRequest."""
    return field(2, 2, integer_bytes(len(value)) + value)


class Connection:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.frame(SETTINGS, 0, 0)
        self.received, self.names, self.next_stream = b"", [], 1
        self.stream_window = 65535  # of a new stream
        self.windows = {0: 65535}
        self.goaway = None  # (error code, words)
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        """False when the other side has had enough."""
        try:
            self.socket.sendall(data)
            return True
        except OSError:
            self.closed = True
            return False

    @staticmethod
    def framed(kind, flags, stream, payload=b""):
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    def frame(self, kind, flags, stream, payload=b""):
        return self.send(self.framed(kind, flags, stream, payload))

    def open(self, block, end=0):
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        self.windows[stream] = self.stream_window
        first, rest = block[:16000], block[16000:]
        self.frame(HEADERS, end | (0 if rest else END_HEADERS), stream, first)
        while rest:
            piece, rest = rest[:16000], rest[16000:]
            self.frame(CONTINUATION, 0 if rest else END_HEADERS, stream, piece)
        return stream

    def call(self, path, body, *more, leave_out=()):
        """The call's status, or RESET or ENDED; and its words."""
        stream = self.open(request_headers(path, *more, leave_out=leave_out))
        seen, body = {}, memoryview(body)
        end = time.monotonic() + 30
        while body:
            room = min(16000, self.windows[0], self.windows[stream])
            if room > 0:
                if not self.frame(DATA, 0, stream, body[:room]):
                    break
                self.windows[0] -= len(body[:room])
                self.windows[stream] -= len(body[:room])
                body = body[room:]
            elif (got := self.read_frame(end)) is None or got[0] in (RST_STREAM, HEADERS) and got[2] == stream:
                return self.ended(got, seen)  # refused before it was all sent
        self.frame(DATA, END_STREAM, stream)
        return self.status_of(stream)

    def status_of(self, stream, seconds=30):
        end = time.monotonic() + seconds
        seen = {}
        while (got := self.read_frame(end)) is not None:
            kind, flags, at, payload = got
            if at == stream and (kind == RST_STREAM or kind == HEADERS):
                status = self.ended(got, seen)
                if status is not None:
                    return status
        return self.ended(None, seen)

    def ended(self, got, seen):
        """What a frame says of its call, None if nothing yet; `seen` collects the headers."""
        if got is None:
            return ENDED, self.goaway
        kind, flags, _, payload = got
        if kind == RST_STREAM:
            return RESET, struct.unpack(">I", payload)[0]
        seen.update(self.decode(payload))
        return (int(seen.get("grpc-status", RESET)), seen.get("grpc-message", "")) if flags & END_STREAM else None

    def read_frame(self, end):
        """None: the connection has ended, or nothing came in time."""
        while len(self.received) < 9 or len(self.received) < 9 + int.from_bytes(self.received[:3], "big"):
            self.socket.settimeout(max(0.01, end - time.monotonic()))
            try:
                piece = self.socket.recv(65536)
            except socket.timeout:
                return None
            except OSError:
                piece = b""
            if not piece:
                self.closed = True
                return None
            self.received += piece
        length = int.from_bytes(self.received[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", self.received[3:9])
        payload, self.received = self.received[9:9 + length], self.received[9 + length:]
        if kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    self.windows = {at: room + (value - self.stream_window if at else 0) for at, room in self.windows.items()}
                    self.stream_window = value
            self.frame(SETTINGS, ACK, 0)
        elif kind == WINDOW_UPDATE:
            self.windows[stream] = self.windows.get(stream, 0) + struct.unpack(">I", payload)[0]
        elif kind == PING and not flags & ACK:
            self.frame(PING, ACK, 0, payload)
        elif kind == GOAWAY:
            self.goaway = struct.unpack(">I", payload[4:8])[0], payload[8:].decode(errors="replace")
        return kind, flags, stream, payload

    def wait_end(self, seconds=30):
        """Reads until the other side has closed."""
        end = time.monotonic() + seconds
        while not self.closed and time.monotonic() < end:
            self.read_frame(end)
        return self.closed

    def decode(self, block):
        """Names and values of a header block as far as gRPC's library writes them: no Huffman code, few static names."""
        found, at = {}, 0

        def number(bits):
            nonlocal at
            value, at = block[at] & ((1 << bits) - 1), at + 1
            if value == (1 << bits) - 1:
                shift = 0
                while True:
                    byte, at = block[at], at + 1
                    value += (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
            return value

        def string():
            nonlocal at
            if block[at] & 0x80:
                raise ValueError("Huffman code")
            length = number(7)
            value, at = block[at:at + length].decode(errors="replace"), at + length
            return value

        def known(index):
            return self.names[index - 62] if index > 61 else (f"static {index}", "")

        while at < len(block):
            if block[at] & 0x80:
                name, value = known(number(7))
            elif block[at] & 0xE0 == 0x20:
                number(5)
                continue
            else:
                keeps = bool(block[at] & 0x40)
                index = number(6 if keeps else 4)
                name, value = known(index)[0] if index else string(), string()
                if keeps:
                    self.names.insert(0, (name, value))
            found[name] = value
        return found


class Wire(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(prefill=0, decode=0, experts=0)
        cls.cluster.start("router")
        cls.addClassCleanup(cls.cluster.stop)

        def alive():
            try:
                return cls.cluster.get("/healthz")[0] == 200
            except OSError:
                return False
        wait_until(alive, "the router listens")
        cls.process = cls.cluster.processes["router"]

    def setUp(self):
        self.before = self.resident()

    def tearDown(self):
        self.assertIsNone(self.process.poll(), "the router is gone")
        self.assertEqual(self.ask(message(text(b"Hello"))), OK)

    def resident(self):
        with open(f"/proc/{self.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def connect(self, port=None):
        return Connection(port or self.cluster.grpc_port)

    def ask(self, body, *more, path=TOKENIZE, **options):
        with self.connect() as connection:
            return connection.call(path, body, *more, **options)[0]

    def assert_memory_flat(self, allowance=64 << 20):
        self.assertLess(self.resident() - self.before, allowance)

    def test_G01_unknown_services_and_methods_are_unimplemented(self):
        for path in ("/millrace.v1.Inference/Nothing", "/no.Such/Thing", "/", "/millrace.v1.Inference/tokenize",
                     "/millrace.v1.Inference/Tokenize/", "/millrace.v1.Handoff/Reserve"):
            self.assertEqual(self.ask(message(b""), path=path), UNIMPLEMENTED, path)

    def test_G02_G06_G08_what_is_no_message_of_that_type_is_refused(self):
        for name, body in (("junk", b"\xff" * 64), ("a field number of 0", b"\x00\x00"), ("half a field", b"\x12\x7f"),
                           ("groups 200 deep", b"\x0b" * 200), ("not UTF-8", text(b"\xff\xfe")),
                           ("a varint without end", b"\x08" + b"\xff" * 11)):
            self.assertIn(self.ask(message(body)), UNREADABLE, name)

    def test_G06_a_million_unknown_fields_take_bounded_time(self):
        start = time.monotonic()
        self.assertEqual(self.ask(message(text(b"x") + field(1000, 0, b"\x01") * 1_000_000)), OK)
        self.assertLess(time.monotonic() - start, 30)
        # As many numbers in a packed field as a message can hold.
        packed = b"\x05" * (MAX_PUBLIC_BYTES - 64)
        self.assertEqual(self.ask(message(field(1000, 2, integer_bytes(len(packed)) + packed))), OK)

    def test_G03_a_length_that_lies_costs_nothing(self):
        for length in (2 ** 32 - 1, MAX_PUBLIC_BYTES, 1000, 2):
            self.assertIn(self.ask(message(text(b"xyz"), length=length)), UNREADABLE, length)
        self.assert_memory_flat()

    def test_G04_a_message_over_the_limit_is_refused_with_the_limit(self):
        for port, path, limit in ((self.cluster.grpc_port, TOKENIZE, MAX_PUBLIC_BYTES),
                                  (self.cluster.control_port, "/millrace.v1.Cluster/Join", MAX_INTERNAL_BYTES)):
            with self.connect(port) as connection:
                status, words = connection.call(path, message(bytes(limit + 1)))
            self.assertEqual(status, RESOURCE_EXHAUSTED, words)
            self.assertIn(str(limit), words)

    def test_G05_compression_is_known_or_refused_and_no_way_around_the_limit(self):
        self.assertEqual(self.ask(message(b"x", compressed=1), ("grpc-encoding", "snappiest")), UNIMPLEMENTED)
        self.assertEqual(self.ask(message(gzip.compress(text(b"x")), compressed=1), ("grpc-encoding", "gzip")), OK)
        bomb = gzip.compress(text(b"a" * (256 << 20)), compresslevel=1)
        self.assertLess(len(bomb), MAX_PUBLIC_BYTES)
        self.assertEqual(self.ask(message(bomb, compressed=1), ("grpc-encoding", "gzip")), RESOURCE_EXHAUSTED)
        self.assertIn(self.ask(message(b"no gzip", compressed=1), ("grpc-encoding", "gzip")), (INTERNAL, -1))

    def test_G14_any_deadline_is_taken_or_refused(self):
        for timeout in ("99999999H", "10S", "1H"):
            self.assertEqual(self.ask(message(text(b"x")), ("grpc-timeout", timeout)), OK, timeout)
        for timeout in ("0n", "-1S", "1", "S", "1" * 40 + "S", ""):
            self.assertNotEqual(self.ask(message(text(b"x")), ("grpc-timeout", timeout)), ENDED, timeout)

    def test_G19_bad_metadata_costs_at_most_its_own_connection(self):
        # It should cost its own stream; gRPC 1.51 gives the connection up soon after, and no other one.
        with self.connect() as other:
            for bad in ([("x-long", "v" * (17 << 10))], [("x-bin", "!!!not base64!!!")]):
                with self.connect() as connection:
                    # A limit holds from when the client has acknowledged it.
                    self.assertEqual(connection.call(TOKENIZE, message(text(b"x")))[0], OK)
                    self.assertNotEqual(connection.call(TOKENIZE, message(text(b"x")), *bad)[0], OK)
                self.assertEqual(other.call(TOKENIZE, message(text(b"x")))[0], OK)

    def test_G20_a_ping_every_ten_milliseconds_ends_the_connection(self):
        with self.connect() as connection:
            self.assertEqual(connection.call(TOKENIZE, message(text(b"x")))[0], OK)
            for _ in range(300):
                if connection.goaway or not connection.frame(PING, 0, 0, b"12345678"):
                    break
                soon = time.monotonic() + 0.01
                while connection.read_frame(soon) is not None:
                    pass
            self.assertTrue(connection.wait_end())
            self.assertEqual(connection.goaway, (ENHANCE_YOUR_CALM, "too_many_pings"))

    def test_G21_G22_G23_headers_that_once_aborted_the_library_are_errors_of_a_stream(self):
        long = ("x-long", "v" * 9000)
        for name, value, leave_out in (("te", "x", ("te",)), (":scheme", "x", (":scheme",)),
                                       ("grpclb_client_stats", "x", ())):
            with self.connect() as connection:
                block = header(name, value) + request_headers(TOKENIZE, long, leave_out=leave_out)
                stream = connection.open(block)
                connection.frame(DATA, END_STREAM, stream, message(text(b"x")))
                connection.status_of(stream, seconds=5)
            self.assertIsNone(self.process.poll(), name)

    def test_G24_header_blocks_that_promise_too_much_end_their_connection(self):
        for name, block in (("a string of 4 GiB", b"\x00" + integer(1 << 32, 7) + b"x" * 100),
                            ("a padded number", b"\x00\x7f" + b"\x80" * 10_000 + b"\x00"),
                            ("an index of nothing", b"\xff\xff\xff\xff\x0f")):
            with self.connect() as connection:
                stream = connection.open(block)
                status = connection.status_of(stream, seconds=20)[0]
                self.assertNotEqual(status, OK, name)
        self.assert_memory_flat()

    def test_H25_continuations_without_end_do_not_stop_others(self):
        with self.connect() as connection:
            connection.frame(HEADERS, 0, 1, request_headers(TOKENIZE)[:20])
            piece = header("x-more", "v" * 4000)
            for _ in range(2000):
                if not connection.frame(CONTINUATION, 0, 1, piece):
                    break
            self.assertEqual(self.ask(message(text(b"x"))), OK)

    def test_H24_a_client_that_resets_what_it_opens_does_not_stop_others(self):
        with self.connect() as hostile:
            block = request_headers(TOKENIZE)
            start = time.monotonic()
            for _ in range(200):
                batch = b""
                for _ in range(100):
                    batch += Connection.framed(HEADERS, END_HEADERS, hostile.next_stream, block)
                    batch += Connection.framed(RST_STREAM, 0, hostile.next_stream, struct.pack(">I", 8))
                    hostile.next_stream += 2
                if not hostile.send(batch):
                    break
            self.assertEqual(self.ask(message(text(b"x"))), OK)
            self.assertLess(time.monotonic() - start, 60)
        self.assert_memory_flat()

    def test_H25_floods_of_frames_that_carry_nothing_do_not_stop_others(self):
        for name, frame in (("SETTINGS", Connection.framed(SETTINGS, 0, 0)),
                            ("PRIORITY", Connection.framed(2, 0, 1, struct.pack(">IB", 0, 1))),
                            ("empty DATA", Connection.framed(DATA, 0, 1)),
                            ("unknown frames", Connection.framed(99, 0, 0, b"x" * 100))):
            with self.connect() as hostile:
                hostile.open(request_headers(TOKENIZE))
                for _ in range(100):
                    if not hostile.send(frame * 200):
                        break
                self.assertEqual(self.ask(message(text(b"x"))), OK, name)
        self.assert_memory_flat()


if __name__ == "__main__":
    unittest.main(verbosity=2)
