# find_package(edgelm): the target edgelm::edgelm, a shared library with <edgelm/edgelm.h> and <edgelm/edgelm.hpp>.
include(${CMAKE_CURRENT_LIST_DIR}/edgelmTargets.cmake)
