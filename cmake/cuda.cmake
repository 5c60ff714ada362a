# SPDX-License-Identifier: Apache-2.0
# Finds a CUDA 13 compiler and enables the language, or says what is missing and leaves MILLRACE_HAVE_CUDA off.
#
# Looked for, in order: -DCMAKE_CUDA_COMPILER, $CUDACXX, the toolkit that `deploy/setup.sh --cuda` unpacks, PATH,
# /usr/local/cuda. The runtime is linked statically and the driver is never linked: it is opened by the runtime when
# first asked for, so one binary starts on machines without a card.
set(WITH_CUDA ON CACHE STRING "Build the CUDA backend: ON (if a CUDA 13 compiler is found), OFF, REQUIRED")
set_property(CACHE WITH_CUDA PROPERTY STRINGS ON OFF REQUIRED)

set(MILLRACE_HAVE_CUDA OFF)
if(NOT WITH_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(MILLRACE_NVCC nvcc PATHS ${PROJECT_SOURCE_DIR}/.cache/cuda/toolkit/bin NO_DEFAULT_PATH)
    find_program(MILLRACE_NVCC nvcc PATHS /usr/local/cuda/bin)
    mark_as_advanced(MILLRACE_NVCC)
    if(MILLRACE_NVCC)
      set(CMAKE_CUDA_COMPILER "${MILLRACE_NVCC}")
    endif()
  endif()

  set(millrace_cuda_problem "no nvcc found (deploy/setup.sh --cuda fetches one)")
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE millrace_nvcc_version
      ERROR_VARIABLE millrace_nvcc_error RESULT_VARIABLE millrace_nvcc_status)
    if(millrace_nvcc_version MATCHES "release ([0-9]+)\\.([0-9]+)" AND CMAKE_MATCH_1 EQUAL 13)
      set(MILLRACE_HAVE_CUDA ON)
    else()
      set(millrace_cuda_problem
        "${CMAKE_CUDA_COMPILER} is not a CUDA 13 compiler (found: ${CMAKE_MATCH_1}.${CMAKE_MATCH_2})")
      unset(CMAKE_CUDA_COMPILER)
    endif()
  endif()

  if(MILLRACE_HAVE_CUDA)
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 90a-real)
    endif()
    # A toolkit from PyPI keeps its libraries in lib, one from an installer in lib64; nvcc looks in the latter only.
    cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH millrace_cuda_bin)
    cmake_path(GET millrace_cuda_bin PARENT_PATH millrace_cuda_root)
    set(ENV{LIBRARY_PATH} "${millrace_cuda_root}/lib:$ENV{LIBRARY_PATH}")
    enable_language(CUDA)
    # CMake 3.25 does not know that this compiler has C++20.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    find_library(MILLRACE_CUDART cudart_static PATHS ${millrace_cuda_root}/lib64 ${millrace_cuda_root}/lib
      NO_DEFAULT_PATH REQUIRED)
    mark_as_advanced(MILLRACE_CUDART)
    # For host code that calls the runtime. rt and dl are what the static runtime needs on older glibc.
    add_library(millrace_cuda INTERFACE)
    target_include_directories(millrace_cuda SYSTEM INTERFACE ${millrace_cuda_root}/include)
    target_link_libraries(millrace_cuda INTERFACE ${MILLRACE_CUDART} Threads::Threads rt dl)
    message(STATUS "CUDA backend: ${CMAKE_CUDA_COMPILER}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
  elseif(WITH_CUDA STREQUAL "REQUIRED")
    message(FATAL_ERROR "CUDA backend: ${millrace_cuda_problem}")
  else()
    message(STATUS "CUDA backend: not built, ${millrace_cuda_problem}")
  endif()
endif()
