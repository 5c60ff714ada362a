# SPDX-License-Identifier: Apache-2.0
# Turns files into one C++ source, so that the binary needs none of them beside it.
#
#   cmake -DOUT=x.cc -DHEADER=a/b.h -DFUNCTION=ns::Files -DPREFIX=/page/ "-DFILES=one;two" -P embed.cmake
#
# HEADER declares what OUT defines: a span of EmbeddedFile {path, content_type, content}, in the order of FILES.
set(types_.html "text/html; charset=utf-8")
set(types_.css "text/css; charset=utf-8")
set(types_.js "text/javascript; charset=utf-8")
set(types_.svg "image/svg+xml")

set(entries "")
foreach(file IN LISTS FILES)
  file(READ "${file}" content)
  if(content MATCHES "\\)embedded\"")
    message(FATAL_ERROR "${file}: holds the delimiter of the literal it would become")
  endif()
  get_filename_component(name "${file}" NAME)
  get_filename_component(extension "${file}" LAST_EXT)
  if(NOT DEFINED types_${extension})
    message(FATAL_ERROR "${file}: no content type is known for ${extension}")
  endif()
  string(APPEND entries "    {\"${PREFIX}${name}\", \"${types_${extension}}\", R\"embedded(${content})embedded\"},\n")
endforeach()
file(WRITE "${OUT}" "// Made by cmake/embed.cmake.\n#include \"${HEADER}\"\n\nnamespace {\n"
  "constexpr millrace::router::EmbeddedFile kFiles[] = {\n${entries}};\n}  // namespace\n\n"
  "absl::Span<const millrace::router::EmbeddedFile> ${FUNCTION}() { return kFiles; }\n")
