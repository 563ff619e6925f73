# Where the sources for CUDA devices go (device/cuda and kernels/cuda): to a compiler for such devices, to that of C++ with a
# model of one, or nowhere. Included before any target; cadre_cuda(FOLDER) adds the sources of a folder to its library.
#
# Nothing of CUDA but its static runtime is linked, so that the program starts on machines that have none of it.
if(CADRE_CUDA_MODEL)
  set(cuda MODEL)
  enable_language(CXX)
  set(CMAKE_CXX_STANDARD 17)
  set(CMAKE_CXX_STANDARD_REQUIRED ON)
elseif(NOT CADRE_CUDA STREQUAL OFF)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(CADRE_NVCC nvcc PATHS /usr/local/cuda/bin /opt/cuda/bin)
    if(CADRE_NVCC)
      set(ENV{CUDACXX} ${CADRE_NVCC}) # where the check and the language look
    endif()
  endif()
  set(CMAKE_CUDA_ARCHITECTURES OFF) # said by -gencode, for each source
  include(CheckLanguage)
  if(CADRE_CUDA STREQUAL AUTO)
    check_language(CUDA)
  endif()
  if(CMAKE_CUDA_COMPILER OR NOT CADRE_CUDA STREQUAL AUTO)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.1) # the first that knows all of sm_90a that is used
      set(cuda DEVICE)
    elseif(NOT CADRE_CUDA STREQUAL AUTO)
      message(FATAL_ERROR "CUDA needs nvcc 12.1 or newer; ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}")
    endif()
  endif()
  if(cuda)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(flags "-O3;--expt-relaxed-constexpr;-Xcompiler=-Wall;$<$<NOT:$<CONFIG:Release>>:-lineinfo>")
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0) # whose drivers all unpack it: a fifth of the bytes
      list(APPEND flags -compress-mode=size)
    endif()
    add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:${flags}>")
    add_link_options(-static-libstdc++ -static-libgcc)
  endif()
endif()
if(NOT cuda)
  message(STATUS "without CUDA: cadre trains on processors only")
endif()

function(cadre_cuda folder)
  if(NOT cuda)
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${folder}/cuda/*.cu)
  if(cuda STREQUAL MODEL)
    set_source_files_properties(${sources} PROPERTIES LANGUAGE CXX)
    file(GLOB model CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${folder}/cuda/*.cpp)
    set_property(SOURCE ${model} APPEND PROPERTY COMPILE_OPTIONS -O3) # it multiplies matrices
    if(CADRE_SANITIZE) # which takes the compiler minutes otherwise, and is no slower
      set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_OPTIONS -O1 -g1)
    endif()
    target_sources(cadre_${folder} PRIVATE ${sources} ${model})
    target_compile_definitions(cadre_${folder} PUBLIC CADRE_CUDA_MODEL=1)
    target_compile_options(cadre_${folder} PRIVATE
      "$<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas;-Wno-extra;-Wno-shadow;-Wshadow=local>") # habits of C
  else()
    foreach(source ${sources})
      set(architectures -gencode=arch=compute_90a,code=sm_90a)
      if(NOT source MATCHES "_sm90\\.cu$") # what only those have
        list(APPEND architectures "-gencode=arch=compute_80,code=[sm_80,compute_80]") # and for newer ones to translate
      endif()
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${architectures}")
    endforeach()
    target_sources(cadre_${folder} PRIVATE ${sources})
    target_compile_definitions(cadre_${folder} PUBLIC CADRE_CUDA=1)
  endif()
endfunction()
