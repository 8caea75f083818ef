/* Stores to each of 200 pages, twice, in order, for 60 ms of its time at least; then tells its process
 * and waits for a line. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 200 };

int main(void) {
    volatile unsigned char *memory = malloc(PAGE * PAGES);
    for (int round = 0; round < 2 || clock() < CLOCKS_PER_SEC * 6 / 100; round++)
        for (int page = 0; page < PAGES; page++)
            memory[page * PAGE] = round;
    printf("%d\n", (int)getpid());
    fflush(stdout);
    return getchar() == '\n' ? 0 : 1;
}
