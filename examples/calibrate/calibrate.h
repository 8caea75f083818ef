/* What host and enclave agree on. */
#ifndef CALIBRATE_H
#define CALIBRATE_H

#include <stdint.h>

enum { NOTHING, RESERVE, TOUCH };

struct request {
    uint64_t first, pages; /* RESERVE: `pages` in all.  TOUCH: these, in order */
};

#endif
