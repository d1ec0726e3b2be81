# libedgelm: bundles in an app without Python. Everything above, and what is in this folder.
# It links neither ONNX Runtime nor CUDA: both are opened at run time.

file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/../../pyproject.toml EDGELM_VERSION REGEX "^version = \"")
string(REGEX REPLACE "^version = \"(.*)\"$" "\\1" EDGELM_VERSION "${EDGELM_VERSION}")
file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/capi/edgelm.h EDGELM_ABI REGEX "^#define EDGELM_ABI_VERSION ")
string(REGEX REPLACE "^#define EDGELM_ABI_VERSION " "" EDGELM_ABI "${EDGELM_ABI}")

# The parity check's limits, which Python reads from the same file.
set(limits ${CMAKE_CURRENT_SOURCE_DIR}/../../edgelm/parity/tables/limits.json)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${limits})
file(READ ${limits} EDGELM_LIMITS)
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/limits_json.h @ONLY
     CONTENT "inline constexpr char kLimitsJson[] = R\"json(@EDGELM_LIMITS@)json\";\n")
# The names of Arm's cores, which Python reads from the same file.
set(cores ${CMAKE_CURRENT_SOURCE_DIR}/../../edgelm/tables/arm_cores.json)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${cores})
file(READ ${cores} EDGELM_ARM_CORES)
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/arm_cores_json.h @ONLY
     CONTENT "inline constexpr char kArmCoresJson[] = R\"json(@EDGELM_ARM_CORES@)json\";\n")

file(GLOB_RECURSE EDGELM_CAPI CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/capi/*.cc
     ${CMAKE_CURRENT_SOURCE_DIR}/cuda/executor/*.cc)
add_library(edgelm_capi OBJECT ${EDGELM_CAPI})
target_include_directories(edgelm_capi PRIVATE ${CMAKE_CURRENT_BINARY_DIR}  # limits_json.h, arm_cores_json.h
                           ${CMAKE_CURRENT_SOURCE_DIR}/cuda)  # as kernels include each other
# What is called for each token or each byte of a text is worth its size.
target_compile_options(edgelm_capi PRIVATE ${EDGELM_FLAGS} ${EDGELM_SIZE_FLAGS} -ffunction-sections -fdata-sections)
set(EDGELM_FAST ${EDGELM_CAPI})
list(FILTER EDGELM_FAST INCLUDE REGEX "/capi/(tokenizer/(json|pieces)|parity/numbers)/|/(sampling|hashes|json_parser)[.]cc")
set_source_files_properties(${EDGELM_FAST} PROPERTIES COMPILE_OPTIONS "${EDGELM_OPS_FLAGS}")
target_compile_definitions(edgelm_capi PRIVATE ${EDGELM_DEFINITIONS} EDGELM_BUILDS_LIBRARY EDGELM_VERSION="${EDGELM_VERSION}")

# Launch planning and the choice of kernels, without the plugins, which open their own file when they are loaded.
set(EDGELM_PLANNING
    "$<FILTER:$<TARGET_OBJECTS:edgelm_gpu>,EXCLUDE,/(counters|driver|kernel_archive|plugin|exports)[.]cc[.]o(bj)?$>")
# Without what the other libraries export.
set(EDGELM_OPERATORS_INSIDE
    "$<FILTER:$<TARGET_OBJECTS:edgelm_operators>;$<TARGET_OBJECTS:edgelm_core>,EXCLUDE,/(exports|measure)[.]cc[.]o(bj)?$>")
set(EDGELM_OBJECTS $<TARGET_OBJECTS:edgelm_capi> ${EDGELM_OPERATORS_INSIDE} $<TARGET_OBJECTS:edgelm_memory>
                   $<TARGET_OBJECTS:edgelm_system> ${EDGELM_PLANNING} ${EDGELM_TABLES})

# cmake --install BUILD --component edgelm --prefix P [--strip]: the library, its headers, and what finds them from CMake
# (find_package(edgelm), target edgelm::edgelm) and pkg-config. The installed folder can be moved.
function(edgelm_install_library)
  set(CMAKE_INSTALL_LIBDIR lib CACHE STRING "Folder of libraries in the prefix")  # lib64 or lib/TRIPLET otherwise
  include(GNUInstallDirs)
  include(CMakePackageConfigHelpers)
  set(package ${CMAKE_INSTALL_LIBDIR}/cmake/edgelm)
  target_include_directories(edgelm INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  install(TARGETS edgelm EXPORT edgelmTargets
          LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT edgelm
          ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT edgelm
          RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT edgelm)
  install(FILES capi/edgelm.h capi/edgelm.hpp DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/edgelm COMPONENT edgelm)
  install(EXPORT edgelmTargets NAMESPACE edgelm:: DESTINATION ${package} COMPONENT edgelm)
  write_basic_package_version_file(edgelmConfigVersion.cmake VERSION ${EDGELM_VERSION} COMPATIBILITY SameMajorVersion)
  install(FILES cmake/edgelmConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/edgelmConfigVersion.cmake DESTINATION ${package}
          COMPONENT edgelm)
  string(REGEX REPLACE "[^/]+" ".." EDGELM_PREFIX ${CMAKE_INSTALL_LIBDIR}/pkgconfig)  # from there to the prefix
  configure_file(cmake/edgelm.pc.in edgelm.pc @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/edgelm.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT edgelm)
endfunction()

# bin/edgelm-parity: the check of a device as a program. It uses edgelm.h alone, as an app does, and finds the library
# beside its own folder, wherever that is.
function(edgelm_parity_program)
  add_executable(edgelm_parity capi/programs/parity.c capi/programs/parity_summary.c capi/programs/json_reader.c)
  set_target_properties(edgelm_parity PROPERTIES OUTPUT_NAME edgelm-parity LINKER_LANGUAGE C C_VISIBILITY_PRESET hidden
                        C_STANDARD 11 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF)
  target_compile_options(edgelm_parity PRIVATE -Os -Wall -Wextra -Werror=return-type)
  target_link_libraries(edgelm_parity PRIVATE edgelm)
  file(RELATIVE_PATH library /${CMAKE_INSTALL_BINDIR} /${CMAKE_INSTALL_LIBDIR})
  if(WIN32)
    target_link_libraries(edgelm_parity PRIVATE shell32)
  elseif(APPLE)
    set_target_properties(edgelm_parity PROPERTIES INSTALL_RPATH "@loader_path/${library}")
  else()
    target_link_libraries(edgelm_parity PRIVATE m)
    set_target_properties(edgelm_parity PROPERTIES INSTALL_RPATH "$ORIGIN/${library}")
  endif()
  install(TARGETS edgelm_parity RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT edgelm)
endfunction()

if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/capi/api.cc)
  add_library(edgelm SHARED ${EDGELM_OBJECTS} ${EDGELM_ALLOCATION})
  set_target_properties(edgelm PROPERTIES LINKER_LANGUAGE CXX VERSION ${EDGELM_VERSION} SOVERSION ${EDGELM_ABI})
  if(WIN32)  # edgelm.dll and edgelm.lib, which MSVC can link
    set_target_properties(edgelm PROPERTIES PREFIX "" IMPORT_PREFIX "" IMPORT_SUFFIX ".lib")
  endif()
  target_link_libraries(edgelm PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND NOT EDGELM_SANITIZE)
    # The version script hides what other libraries of ours export, and lets the linker drop what then is unused.
    set(exports ${CMAKE_CURRENT_SOURCE_DIR}/capi/exports.map)
    target_link_options(edgelm PRIVATE -Wl,-z,defs,-z,noexecstack,-z,relro,-z,now -Wl,--gc-sections
                        -Wl,--version-script=${exports})
    set_target_properties(edgelm PROPERTIES LINK_DEPENDS ${exports})
  endif()
  edgelm_install_library()
  edgelm_parity_program()
endif()

# Build tests/capi/*_test.cc. From an archive each takes only the parts that it needs.
function(edgelm_library_tests)
  add_library(edgelm_parts STATIC EXCLUDE_FROM_ALL ${EDGELM_OBJECTS})
  set_target_properties(edgelm_parts PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(edgelm_parts PUBLIC Threads::Threads ${CMAKE_DL_LIBS})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/capi/*_test.cc)
  foreach(source ${sources})
    get_filename_component(name ${source} NAME_WE)
    add_executable(capi_${name} ${source})
    target_include_directories(capi_${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/tests)
    target_compile_options(capi_${name} PRIVATE ${EDGELM_FLAGS} ${EDGELM_OPS_FLAGS})
    target_compile_definitions(capi_${name} PRIVATE ${EDGELM_DEFINITIONS} EDGELM_BUILDS_LIBRARY)
    target_link_libraries(capi_${name} PRIVATE edgelm_parts)
    if(CMAKE_CROSSCOMPILING)
      set(reduced reduced)  # under emulation the longest tests would take minutes
    endif()
    # Files of the repository are opened by their path in it.
    string(REPLACE "_test" "" name capi_${name})
    add_test(NAME ${name} COMMAND ${name}_test ${reduced}
             WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/../..)
    add_dependencies(edgelm_tests ${name}_test)
  endforeach()
  add_library(fake_onnxruntime MODULE ${CMAKE_CURRENT_SOURCE_DIR}/tests/capi/fake_onnxruntime.cc)
  target_compile_definitions(capi_runtime_test PRIVATE EDGELM_FAKE_ONNXRUNTIME="$<TARGET_FILE:fake_onnxruntime>")
  add_dependencies(capi_runtime_test fake_onnxruntime)
endfunction()
