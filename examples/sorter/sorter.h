/* What host and enclave agree on. */
#ifndef SORTER_H
#define SORTER_H

#include <stdint.h>

enum { OPEN, PUT, SORT, GET };

struct request {
    uint64_t first, count; /* OPEN: count keys in all; PUT, GET: which of them */
    uint64_t *keys;        /* PUT, GET: the host's memory */
};

#endif
