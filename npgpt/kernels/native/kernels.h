// All kernels, for the processor that PROCESSOR and BYTES name. A processors_*.c file includes this once.

#define JOINED(name, processor) name##_##processor
#define WITH_PROCESSOR(name, processor) JOINED(name, processor)
#define NAME(name) WITH_PROCESSOR(name, PROCESSOR)

#include "vector.h"

#include "elementwise.c"
#include "norm.c"
#include "softmax.c"
#include "decode.c"
#include "product.c"
#include "attention.c"
