/* Children that share memory with their parent until one of them stores to it, and children of
 * theirs; parent and children change it at the same time. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CHILDREN = 12, BYTES = 400000 };

static unsigned long sum_of(const unsigned char *memory) {
    unsigned long sum = 0;
    for (int at = 0; at < BYTES; at++)
        sum = sum * 31 + memory[at];
    return sum;
}

int main(void) {
    unsigned char *memory = malloc(BYTES);
    memset(memory, 1, BYTES);
    unsigned long total = 0;
    for (int child = 0; child < CHILDREN; child++) {
        int ends[2];
        if (pipe(ends))
            return 1;
        pid_t pid = fork();
        if (!pid) {
            memset(memory + child * 1000, child, 5000);
            if (child % 4 == 0) {
                if (!fork()) {
                    memory[7] = 9;
                    _exit(sum_of(memory) & 1);
                }
                wait(0);
            }
            unsigned long sum = sum_of(memory);
            _exit(write(ends[1], &sum, sizeof sum) == sizeof sum ? child : 99);
        }
        memory[child * 3000] = child;
        unsigned long sum = 0;
        int status;
        close(ends[1]);
        if (read(ends[0], &sum, sizeof sum) != sizeof sum)
            return 1;
        close(ends[0]);
        waitpid(pid, &status, 0);
        total = total * 17 + sum + WEXITSTATUS(status);
    }
    printf("%lu\n", total + sum_of(memory));
    return 3;
}
