/* Threads that allocate, fill and free memory, are joined, and share a robust mutex whose owner
 * ends without unlocking it, and one with priority inheritance. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 6, GROUPS = 4, BYTES = 120000 };

static pthread_mutex_t robust;

static void *work(void *argument) {
    long number = (long)argument;
    unsigned long sum = 0;
    for (int round = 0; round < 6; round++) {
        unsigned char *memory = malloc(BYTES + number * 1000);
        memset(memory, (int)(number + round), BYTES);
        for (int at = 0; at < BYTES; at += 7)
            sum = sum * 33 + memory[at];
        free(memory);
    }
    return (void *)sum;
}

static pthread_mutex_t inheriting;
static unsigned long counter;

static void *contend(void *argument) {
    for (int round = 0; round < 300; round++) {
        pthread_mutex_lock(&inheriting);
        counter++;
        pthread_mutex_unlock(&inheriting);
    }
    return argument;
}

static void *die_with_lock(void *argument) {
    pthread_mutex_lock(&robust);
    return argument;
}

int main(void) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &attributes);
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&inheriting, &attributes);
    unsigned long total = 0;
    for (int group = 0; group < GROUPS; group++) {
        pthread_t threads[THREADS], last;
        for (long number = 0; number < THREADS; number++)
            pthread_create(&threads[number], 0, work, (void *)number);
        for (int number = 0; number < THREADS; number++) {
            void *result;
            pthread_join(threads[number], &result);
            total = total * 7 + (unsigned long)result;
        }
        pthread_create(&last, 0, die_with_lock, 0);
        pthread_join(last, 0);
        int result = pthread_mutex_lock(&robust);
        pthread_mutex_consistent(&robust);
        pthread_mutex_unlock(&robust);
        total = total * 7 + (result == EOWNERDEAD);
    }
    pthread_t threads[3];
    for (int number = 0; number < 3; number++)
        pthread_create(&threads[number], 0, contend, 0);
    for (int number = 0; number < 3; number++)
        pthread_join(threads[number], 0);
    printf("%lu %lu\n", total, counter);
    return 0;
}
