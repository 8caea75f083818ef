/* What gdb is shown: a function with an argument, one that runs until it is told, and memory. */

#include <softsgx.h>

static volatile int secret = 0x5ec7e7;

static int triple(int value)
{
    int result = 3 * value;

    return result;
}

static int spin(volatile int *stop, volatile int *inside)
{
    int turns = 0;

    *inside = 1;
    while (!*stop)
        turns += secret;
    return turns;
}

static int tally(volatile int *turns)
{
    return ++*turns;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    if (function == 2)
        __builtin_trap();
    if (function == 3) {
        int turns = 0;

        for (size_t turn = 0; turn < size; turn++)
            tally(&turns);
        return turns;
    }
    if (function)
        return spin(argument, (volatile int *)argument + 1) & 1;
    return triple((int)size);
}
