/* Uses known pages of an array of 512 pages for known times: phase N uses the pages that N + 2
 * divides, reads the even ones of them and writes the others, again and again for 80 ms of its time. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, PAGES = 512, PHASES = 3 };

static long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000L + t.tv_nsec / 1000000;
}

int main(void) {
    size_t bytes = (size_t)PAGES * PAGE;
    /* Not where the loader had anything, which would be pages of the same numbers. */
    volatile unsigned char *array = mmap((void *)(1ul << 44), bytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    unsigned long sum = 0;
    if (array == MAP_FAILED)
        abort();
    for (int phase = 0; phase < PHASES; phase++) {
        long end = now_ms() + 80;
        unsigned char stored = 0;
        while (now_ms() < end) {
            stored++;
            for (int page = 0; page < PAGES; page += phase + 2) {
                if (page % 2)
                    array[page * PAGE] = stored;
                else
                    sum += array[page * PAGE];
            }
        }
    }
    printf("%lu\n", sum);
    return 0;
}
