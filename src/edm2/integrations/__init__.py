"""edm2 inside other libraries: each module but those for sharing needs the library that it is for."""
