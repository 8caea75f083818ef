/* processes fork COUNT: seconds of one fork, with the end of the child
 * processes exec COUNT: seconds of one execve of this program, a dynamic one */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static int forks(long count)
{
    double start = now();

    for (long i = 0; i < count; i++) {
        pid_t child = fork();

        if (!child)
            _exit(0);
        if (child < 0 || waitpid(child, NULL, 0) != child)
            return 1;
    }
    printf("%.9f\n", (now() - start) / (double)count);
    return 0;
}

/* Arguments: how many there were, how many are left, when it began. */
static int executions(char **arguments, int first)
{
    long count = strtol(arguments[2], NULL, 10), left = first ? count : strtol(arguments[3], NULL, 10);
    char began[32], remaining[32];

    if (first)
        snprintf(began, sizeof began, "%.9f", now());
    else
        snprintf(began, sizeof began, "%s", arguments[4]);
    if (!left) {
        printf("%.9f\n", (now() - strtod(began, NULL)) / (double)count);
        return 0;
    }
    snprintf(remaining, sizeof remaining, "%ld", left - 1);
    execl(arguments[0], arguments[0], arguments[1], arguments[2], remaining, began, (char *)NULL);
    return 1;
}

int main(int count, char **arguments)
{
    if (count < 3)
        return 2;
    if (!strcmp(arguments[1], "fork"))
        return forks(strtol(arguments[2], NULL, 10));
    return executions(arguments, count == 3);
}
