/* Writes N pages once each, reads them back, and prints a checksum: ROUNDS times. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { PAGE = 4096 };

int main(int argc, char **argv) {
    long pages = argc > 1 ? atol(argv[1]) : 100, rounds = argc > 2 ? atol(argv[2]) : 1;
    unsigned char *array =
        mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned long sum = 0;
    for (long round = 0; round < rounds; round++) {
        for (long page = 0; page < pages; page++)
            array[page * PAGE + round] = (unsigned char)(page * 7 + round);
        for (long page = 0; page < pages; page++)
            for (long at = 0; at <= round; at++)
                sum = sum * 31 + array[page * PAGE + at];
    }
    printf("%lu\n", sum);
    return 0;
}
