/* What host and enclave agree on. */
#ifndef KVSTORE_H
#define KVSTORE_H

#include <stdint.h>

/* Functions. RUN's argument is `count` requests; its result, how many of them found their key. */
enum { OPEN, RUN };

enum { PUT, GET, DELETE };
enum { MAX_KEY = 64, MAX_VALUE = 4096 };

struct request {
    uint32_t what;
    uint32_t key_size, value_size; /* GET: room in, size out */
    int32_t found;                 /* out */
    const char *key;
    char *value;
};

#endif
