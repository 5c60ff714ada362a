# SPDX-License-Identifier: Apache-2.0
# What the build needs from the machine, in one place, and the two helper functions every folder uses.

find_package(Threads REQUIRED)
find_package(absl REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(simdjson REQUIRED)
find_package(spdlog REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(GTest REQUIRED)
find_package(benchmark REQUIRED)
find_package(Boost 1.81 REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)

set(MILLRACE_HAVE_UCX OFF)
if(WITH_UCX)
  pkg_check_modules(UCX IMPORTED_TARGET ucx>=1.13)
  if(UCX_FOUND)
    set(MILLRACE_HAVE_UCX ON)
  else()
    message(WARNING "UCX >= 1.13 not found: built without the UCX transport (install libucx-dev)")
  endif()
endif()

add_library(millrace_warnings INTERFACE)
target_compile_options(millrace_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wnon-virtual-dtor
  -Wno-missing-field-initializers>)
target_compile_options(millrace_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;--expt-relaxed-constexpr>)
if(MILLRACE_WERROR)
  target_compile_options(millrace_warnings INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  target_compile_options(millrace_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()

# What turns a bug into an end instead of a foothold: canaries, fortified functions, checked containers, no variable
# without a value, and jumps that land only where the compiler meant them to. Release only: fortified functions need an
# optimiser, and sanitizers bring checks of their own. nvcc's host code is left out.
set(MILLRACE_HARDENING -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 -D_GLIBCXX_ASSERTIONS -fstack-protector-strong
  -ftrivial-auto-var-init=zero)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND MILLRACE_HARDENING -fcf-protection)
endif()
add_library(millrace_hardened INTERFACE)
target_compile_options(millrace_hardened INTERFACE
  "$<$<AND:$<CONFIG:Release>,$<COMPILE_LANGUAGE:CXX>>:${MILLRACE_HARDENING}>")

# millrace_library(NAME [COMPUTES] SOURCES... DEPS...): one static library of one folder. COMPUTES: it does the model's
# arithmetic on sizes that were checked when the model was loaded; its loops are not hardened.
function(millrace_library name)
  cmake_parse_arguments(ARG "COMPUTES" "" "SOURCES;DEPS;PRIVATE_DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PUBLIC ${ARG_DEPS} PRIVATE millrace_warnings ${ARG_PRIVATE_DEPS})
  if(NOT ARG_COMPUTES)
    target_link_libraries(${name} PRIVATE millrace_hardened)
  endif()
endfunction()

# millrace_test(NAME SOURCES... DEPS... [LABELS...] [TIMEOUT s]): one GoogleTest binary, its cases found by ctest. Tests
# run in the source root and find their data under tests/data and deploy/demo. Cases whose names begin with Cuda need a
# card and have the label gpu only.
function(millrace_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gtest_main GTest::gmock millrace_warnings)
  gtest_discover_tests(${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} DISCOVERY_TIMEOUT 60
    TEST_FILTER "-Cuda*" PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
  if(MILLRACE_HAVE_CUDA)
    gtest_discover_tests(${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} DISCOVERY_TIMEOUT 60 TEST_LIST ${name}_cuda
      TEST_FILTER "Cuda*" PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS gpu)
  endif()
endfunction()

# millrace_bench(NAME SOURCES... DEPS...): one google-benchmark binary; built by default, run by hand.
function(millrace_bench name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} benchmark::benchmark millrace_warnings)
endfunction()
