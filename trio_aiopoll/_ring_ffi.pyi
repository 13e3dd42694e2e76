# The extension module that _ring_build.py makes; _ring.py says what is in it.
ffi: object
lib: object
