/* Gives memory back in an array of 512 pages: maps it and stores to pages 0 to 99, then unmaps pages
 * 10 to 59, maps pages 10 to 19 again and stores to them; then moves pages 90 to 99 elsewhere with
 * mremap. A child that fork has made stores to page 5 and ends. With the argument "brk", the program
 * break grows by 100 pages, which are stored to, and shrinks by 60. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 512 };

static void must(int true_) {
    if (!true_)
        abort();
}

static void fill(unsigned char *at, int pages) {
    for (int page = 0; page < pages; page++)
        at[page * PAGE] = page + 1;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "brk")) {
        unsigned char *start = (void *)(((size_t)sbrk(0) + PAGE - 1) / PAGE * PAGE);
        must(!brk(start + 100 * PAGE));
        fill(start, 100);
        must(!brk(start + 40 * PAGE));
        return 0;
    }
    size_t bytes = (size_t)PAGES * PAGE;
    /* Not where the loader had anything, which would be pages of the same numbers. */
    unsigned char *array = mmap((void *)(1ul << 44), bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    must(array != MAP_FAILED);
    fill(array, 100);
    must(!munmap(array + 10 * PAGE, 50 * PAGE));
    must(mmap(array + 10 * PAGE, 10 * PAGE, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
    fill(array + 10 * PAGE, 10);
    unsigned char *to = mremap(array + 90 * PAGE, 10 * PAGE, 10 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
                               array + 300 * PAGE);
    must(to == array + 300 * PAGE);
    for (int page = 0; page < 10; page++) /* they count where they are used, if not in this interval before */
        must(to[page * PAGE] == 91 + page);
    pid_t child = fork();
    must(child >= 0);
    if (!child) {
        array[5 * PAGE] = 9;
        _exit(0);
    }
    int status;
    must(waitpid(child, &status, 0) == child && !status && array[5 * PAGE] == 6);
    return 0;
}
