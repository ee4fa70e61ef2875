// What a decoder's steps take, as one library: attention, which both parts have, is compiled once.
//
// Its vectors are written out: the compiler, which looks for none, takes two thirds of the time.
// flag: -fno-tree-vectorize

#include "paged_attention.cpp"
#ifdef __AVX512F__
#include "step.cpp"
#endif
