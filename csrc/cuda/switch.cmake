# Decides whether the CUDA module is built, and for which architectures.
# Sets TIKMIX_FAST_WITH_CUDA, TIKMIX_FAST_BUILT_ARCHITECTURES and TIKMIX_FAST_GENCODE.
set(TIKMIX_FAST_CUDA AUTO CACHE STRING "Build the CUDA module: AUTO (where nvcc is found), ON (fail without nvcc), OFF")
set_property(CACHE TIKMIX_FAST_CUDA PROPERTY STRINGS AUTO ON OFF)
set(TIKMIX_FAST_CUDA_ARCHITECTURES "80;86;89;90a;100;120" CACHE STRING
    "Architectures of the CUDA module; those nvcc does not know are left out, PTX is added for the last")

set(TIKMIX_FAST_WITH_CUDA OFF)
string(TOUPPER "${TIKMIX_FAST_CUDA}" tikmix_fast_cuda_choice)
if(NOT tikmix_fast_cuda_choice MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TIKMIX_FAST_CUDA must be AUTO, ON or OFF; got '${TIKMIX_FAST_CUDA}'")
elseif(tikmix_fast_cuda_choice STREQUAL OFF)
  message(STATUS "tikmix_fast: CPU-only build, because TIKMIX_FAST_CUDA=OFF")
  return()
endif()

include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE) # a kept build folder remembers that there was none
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(tikmix_fast_cuda_choice STREQUAL ON)
    message(FATAL_ERROR "TIKMIX_FAST_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH or set CUDACXX to it, "
                        "or build without CUDA by TIKMIX_FAST_CUDA=OFF")
  endif()
  message(STATUS "tikmix_fast: *** CPU-ONLY BUILD: no CUDA compiler was found (TIKMIX_FAST_CUDA=AUTO); "
                 "put nvcc on PATH or set CUDACXX, and TIKMIX_FAST_CUDA=ON to insist ***")
  return()
endif()

execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
set(TIKMIX_FAST_BUILT_ARCHITECTURES "")
set(TIKMIX_FAST_GENCODE "")
foreach(architecture IN LISTS TIKMIX_FAST_CUDA_ARCHITECTURES)
  string(REGEX REPLACE "[a-z]$" "" number "${architecture}")
  if(NOT number MATCHES "^[0-9]+$")
    message(FATAL_ERROR "TIKMIX_FAST_CUDA_ARCHITECTURES must be like 80;90a;120; got '${architecture}'")
  elseif(known MATCHES "compute_${number}[^0-9]")
    list(APPEND TIKMIX_FAST_BUILT_ARCHITECTURES ${architecture})
    list(APPEND TIKMIX_FAST_GENCODE "--generate-code=arch=compute_${architecture},code=sm_${architecture}")
    set(last ${number})
  else()
    message(STATUS "tikmix_fast: this nvcc does not know architecture ${architecture}; left out")
  endif()
endforeach()
if(NOT TIKMIX_FAST_BUILT_ARCHITECTURES)
  message(FATAL_ERROR "nvcc knows none of TIKMIX_FAST_CUDA_ARCHITECTURES=${TIKMIX_FAST_CUDA_ARCHITECTURES}")
endif()
# PTX of the plain architecture (90, not 90a, which later GPUs refuse), so that GPUs to come can run it.
list(APPEND TIKMIX_FAST_GENCODE "--generate-code=arch=compute_${last},code=compute_${last}")
# CMake tests the compiler with its own default architecture, which a new nvcc may no longer know.
set(CMAKE_CUDA_ARCHITECTURES ${last})
enable_language(CUDA)
set(TIKMIX_FAST_WITH_CUDA ON)
message(STATUS "tikmix_fast: CUDA module for ${TIKMIX_FAST_BUILT_ARCHITECTURES} with ${CMAKE_CUDA_COMPILER}")
