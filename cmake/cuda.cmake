# fastlm._cuda: built where a CUDA compiler works. Where none does, the reason goes into the build report.

set(cuda_sources csrc/cuda_module.cpp csrc/cuda/runtime.cpp csrc/cuda/activation.cu csrc/cuda/norm.cu csrc/cuda/rope.cu
                 csrc/cuda/cross_entropy.cu csrc/cuda/embedding.cu csrc/cuda/mse_loss.cu csrc/cuda/dropout.cu csrc/cuda/optimizer.cu
                 csrc/cuda/attention.cu csrc/cuda/attention_mma_forward.cu csrc/cuda/attention_mma_backward.cu
                 csrc/cuda/attention_sm90_forward.cu csrc/cuda/attention_sm90_backward.cu
                 csrc/cuda/attention_decode.cu csrc/cuda/attention_f32.cu)

# Sets `problem` to why _cuda cannot be built, or to nothing.
function(fastlm_find_cuda problem)
  set(${problem} "" PARENT_SCOPE)
  include(CheckLanguage)
  check_language(CXX)
  if(NOT CMAKE_CXX_COMPILER)
    set(${problem} "no working C++ compiler was found at build time" PARENT_SCOPE)
    return()
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(FASTLM_NVCC nvcc)
    if(FASTLM_NVCC)
      set(${problem} "no working CUDA compiler was found at build time (${FASTLM_NVCC} cannot build a program)" PARENT_SCOPE)
    else()
      set(${problem} "no working CUDA compiler was found at build time" PARENT_SCOPE)
    endif()
    return()
  endif()
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${problem} "${CMAKE_CUDA_COMPILER} is not NVIDIA's compiler" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS 12.0)
    set(${problem} "CUDA 12.0 or newer is needed to build it, ${CMAKE_CUDA_COMPILER} is ${CMAKE_MATCH_1}" PARENT_SCOPE)
  endif()
endfunction()

# Machine code for each architecture that this compiler knows, and PTX that newer ones translate at load. CUDAARCHS or
# CMAKE_CUDA_ARCHITECTURES override it.
function(fastlm_default_architectures result)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  set(architectures "")
  foreach(architecture 75 80 86 89 90a 100 120)
    string(REGEX REPLACE "a$" "" number ${architecture})
    if(known MATCHES "compute_${number}[^0-9]")
      list(APPEND architectures ${architecture}-real)
    endif()
  endforeach()
  set(${result} ${architectures} 80-virtual PARENT_SCOPE)
endfunction()

if(FASTLM_CUDA STREQUAL "OFF")
  string(APPEND build_report "cuda: switched off by FASTLM_CUDA=OFF\n")
else()
  fastlm_find_cuda(cuda_problem)
  if(NOT cuda_problem)
    if("${CMAKE_CUDA_ARCHITECTURES}$ENV{CUDAARCHS}" STREQUAL "")
      fastlm_default_architectures(CMAKE_CUDA_ARCHITECTURES)
    endif()
    enable_language(CXX)
    enable_language(CUDA)
    fastlm_probe(CUDA probe.cu cuda_problem)
    find_package(Python COMPONENTS Interpreter Development.Module)
    if(NOT Python_Development.Module_FOUND)
      set(cuda_problem "the headers of Python were not found at build time (on Debian: apt install python3-dev)")
    endif()
  endif()
  if(cuda_problem AND FASTLM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FASTLM_CUDA=ON, but ${cuda_problem}")
  elseif(cuda_problem)
    string(APPEND build_report "cuda: ${cuda_problem}\n")
  else()
    message(STATUS "fastlm._cuda: architectures ${CMAKE_CUDA_ARCHITECTURES}")
    find_package(pybind11 CONFIG REQUIRED)

    pybind11_add_module(_cuda MODULE NO_EXTRAS ${cuda_sources})
    target_compile_definitions(_cuda PRIVATE FASTLM_MODULE=_cuda)
    if("${CMAKE_CUDA_ARCHITECTURES};$ENV{CUDAARCHS}" MATCHES "90a")
      target_compile_definitions(_cuda PRIVATE FASTLM_HAS_SM90A)
    endif()
    target_include_directories(_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    set_target_properties(_cuda PROPERTIES
      CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
      CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
      CUDA_VISIBILITY_PRESET hidden
      CUDA_RUNTIME_LIBRARY Static)
    target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
    # The runtime is compiled in and its symbols stay inside: torch brings another of its own.
    target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
    target_link_libraries(_cuda PRIVATE ${CMAKE_DL_LIBS})
    install(TARGETS _cuda LIBRARY DESTINATION fastlm)
  endif()
endif()
