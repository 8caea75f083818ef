/* Changes mappings while their pages come and go, and checks each content: mremap that moves, grows
 * and shrinks, madvise, brk, fixed mappings over others, private files, memory without rights. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 40 };

static void wait_for_an_interval(void) {
    struct timespec from, now;
    clock_gettime(CLOCK_MONOTONIC, &from);
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - from.tv_sec) * 1000000000L + now.tv_nsec - from.tv_nsec < 5000000);
}

static void must(int true_, const char *what) {
    if (!true_) {
        printf("wrong: %s\n", what);
        exit(1);
    }
}

static unsigned char *map(int pages, int flags, void *at) {
    return mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

int main(int argc, char **argv) {
    unsigned char *memory = map(PAGES, 0, 0);
    for (int page = 0; page < PAGES; page++)
        memset(memory + page * PAGE, page + 1, PAGE);
    wait_for_an_interval();
    map(1, 0, 0); /* so that it cannot grow in place */
    unsigned char *moved = mremap(memory, PAGES * PAGE, 2 * PAGES * PAGE, MREMAP_MAYMOVE);
    for (int page = 0; page < PAGES; page++)
        must(moved[page * PAGE + 5] == page + 1, "content after mremap");
    must(moved[PAGES * PAGE] == 0, "a new page is zero");
    wait_for_an_interval();
    moved = mremap(moved, 2 * PAGES * PAGE, PAGES * PAGE, 0);
    must(!madvise(moved, 10 * PAGE, MADV_DONTNEED), "MADV_DONTNEED");
    must(moved[0] == 0 && moved[9 * PAGE] == 0, "dropped pages are zero");
    must(moved[10 * PAGE] == 11, "the page behind them is not");
    must(map(5, MAP_FIXED, moved + 10 * PAGE) == moved + 10 * PAGE, "MAP_FIXED");
    must(moved[10 * PAGE] == 0 && moved[15 * PAGE] == 16, "replaced pages are zero");
    wait_for_an_interval();
    must(!mprotect(moved, PAGES * PAGE, PROT_NONE), "PROT_NONE");
    wait_for_an_interval();
    must(!mprotect(moved, PAGES * PAGE, PROT_READ), "PROT_READ");
    must(moved[20 * PAGE + 9] == 21, "content behind PROT_NONE");

    int file = open(argv[0], O_RDONLY);
    must(argc == 1 && file >= 0, "the program's file");
    unsigned char head[PAGE];
    must(pread(file, head, PAGE, 0) == PAGE, "read");
    unsigned char *private = mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    must(!memcmp(private, head, PAGE), "content of a file");
    private[1] = 'X';
    wait_for_an_interval();
    must(private[1] == 'X' && private[2] == 'L', "a store to a private mapping");
    must(!madvise(private, PAGE, MADV_DONTNEED), "MADV_DONTNEED of a file");
    must(!memcmp(private, head, PAGE), "the content of the file again");
    must(mmap(0, PAGE, PROT_READ, MAP_PRIVATE, 999, 0) == MAP_FAILED, "no file");

    unsigned char *start = sbrk(0);
    must(sbrk(20 * PAGE) == start, "sbrk");
    memset(start, 7, 20 * PAGE);
    wait_for_an_interval();
    must(start[19 * PAGE] == 7, "content behind the break");
    must(sbrk(-10 * PAGE) != (void *)-1 && sbrk(10 * PAGE) != (void *)-1, "sbrk down and up");
    must(start[9 * PAGE] == 7 && start[19 * PAGE] == 0, "memory that was given back is zero");

    /* A system call whose buffer is hidden transfers all of it. */
    int ends[2];
    must(!pipe(ends), "pipe");
    unsigned char *buffer = map(10, 0, 0);
    memset(buffer, 3, 10 * PAGE);
    wait_for_an_interval();
    must(write(ends[1], buffer, 10 * PAGE) == 10 * PAGE, "a write of hidden memory");
    wait_for_an_interval();
    must(read(ends[0], buffer + 5, 9 * PAGE) == 9 * PAGE, "a read into hidden memory");
    must(buffer[5 * PAGE] == 3, "what was read");
    printf("right\n");
    return 0;
}
