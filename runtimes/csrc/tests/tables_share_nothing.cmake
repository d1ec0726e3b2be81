# Fails if an object of OBJECTS defines a weak symbol, or any global symbol besides its table.
if(NOT OBJECTS)
  message(FATAL_ERROR "no objects given")
endif()
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  # On Windows: the address of a table that is read, which every object that reads it has.
  string(REGEX REPLACE "[^\n]+ [.]refptr[.][^\n]+\n" "" symbols "${symbols}")
  string(REGEX MATCHALL " [A-Zuvw] [^\n]+" shared "${symbols}")
  list(LENGTH shared count)
  if(NOT count EQUAL 1 OR NOT shared MATCHES "Kernels")
    message(FATAL_ERROR "${object} should define its table alone, but defines:\n${shared}")
  endif()
endforeach()
