# SPDX-License-Identifier: Apache-2.0
# Is there an nvcc, and what is it to compile for? Sets PYDISTILL_NVCC (false: the build has no CUDA code), enables the
# language, and sets PYDISTILL_CUDA_ARCHITECTURES to the list as TORCH_CUDA_ARCH_LIST writes it ("8.0;9.0+PTX").
# No GPU, no driver and no CUDA build of torch are needed.
set(PYDISTILL_CUDA auto CACHE STRING "CUDA kernels: 1 demands nvcc, 0 leaves them out, auto takes them where nvcc is found")
if(NOT PYDISTILL_CUDA MATCHES "^(0|1|auto)$")
  message(FATAL_ERROR "PYDISTILL_CUDA must be 0, 1 or auto, got '${PYDISTILL_CUDA}'")
endif()

unset(PYDISTILL_NVCC)
if(NOT PYDISTILL_CUDA STREQUAL "0")
  # The packages nvidia-cuda-nvcc and nvidia-cuda-runtime of PyPI put a toolkit into the environment that builds.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u, pathlib as p; s = u.find_spec('nvidia')
print(*(f.parent for d in (s.submodule_search_locations if s else []) for f in sorted(p.Path(d).glob('*/bin/nvcc'))), sep=';', end='')"
    OUTPUT_VARIABLE NVCC_OF_PACKAGES COMMAND_ERROR_IS_FATAL ANY)
  if(CMAKE_CUDA_COMPILER)
    set(PYDISTILL_NVCC ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    find_program(PYDISTILL_NVCC NAMES $ENV{CUDACXX} NO_CACHE)
  else()
    find_program(PYDISTILL_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS ${NVCC_OF_PACKAGES} NO_CACHE)
  endif()
  if(NOT PYDISTILL_NVCC)
    if(PYDISTILL_CUDA STREQUAL "1")
      message(FATAL_ERROR
        "PYDISTILL_CUDA=1, but nvcc was not found: set CUDACXX or CUDA_HOME, or pip install nvidia-cuda-nvcc "
        "nvidia-cuda-runtime nvidia-cuda-cccl. PYDISTILL_CUDA=0 builds without CUDA kernels.")
    endif()
    message(STATUS "CUDA kernels: left out, nvcc was not found")
  endif()
endif()

if(PYDISTILL_NVCC)
  set(CMAKE_CUDA_COMPILER ${PYDISTILL_NVCC})
  set(CMAKE_CUDA_ARCHITECTURES 80) # for the compiler's own test; every target gets the list below
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  if(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    string(REGEX REPLACE "[ ;,]+" ";" PYDISTILL_CUDA_ARCHITECTURES "$ENV{TORCH_CUDA_ARCH_LIST}")
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(PYDISTILL_CUDA_ARCHITECTURES 8.0 9.0+PTX)
  else()
    set(PYDISTILL_CUDA_ARCHITECTURES 8.0 9.0 10.0+PTX)
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "")
  foreach(architecture IN LISTS PYDISTILL_CUDA_ARCHITECTURES)
    if(NOT architecture MATCHES "^([0-9]+)\\.([0-9][a-z]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got '${architecture}'")
    endif()
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real)
    if(CMAKE_MATCH_3)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1}${CMAKE_MATCH_2}-virtual)
    endif()
  endforeach()
  message(STATUS "CUDA kernels: ${PYDISTILL_CUDA_ARCHITECTURES} by ${PYDISTILL_NVCC}")
endif()
