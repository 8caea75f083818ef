/* What host and enclave agree on. */
#include <stdint.h>

enum {
    ADD, TABLE, CONSTRUCTED, HEAP, COPIES, RANGES, FILL, CONTROL, UNDEFINED, FREE_TWICE, OVERFLOW,
    ENTER, ENTERED
};
enum { HEAP_BYTES = 256 << 10, ENCLAVE_BYTES = 512 << 10 };

#define SECRET 0x5ec2e7c0de5ec2e7u

struct shared {
    long a, b, sum;
};
