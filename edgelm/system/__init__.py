"""What differs between operating systems, as runtimes/csrc/system for C++."""
