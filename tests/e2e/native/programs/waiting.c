/*
 * Threads wait for pages while other things happen to them.
 * usage: waiting ENCLAVE HOW
 *   blocked   every signal is blocked, and has a handler: both stay so
 *   timer     a timer interrupts; its signals run a handler
 *   together  several threads use the same pages at the same time
 *   asked     another thread sends signals, and a child stops and continues the process
 *   system    a system call is given memory of the enclave: EFAULT, and nothing hangs
 */
#include "sgx.h"
#include <sys/time.h>
#include <sys/wait.h>
#include <stdatomic.h>

#define PASSES 12
#define THREADS 4

static atomic_int handled, done;

static void handler(int number)
{
	(void)number;
	handled++;
}

static void handle(int number)
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
	CHECK(!sigaction(number, &action, NULL));
}

/* Each page counts its visits. */
static void sweep(uint64_t pass, uint64_t end)
{
	for (; pass < end; pass++) {
		struct run run;
		CHECK(!call(0, SWEEP, data, data_pages, pass, &run) && run.function == 4);
	}
}

static void blocked(void)
{
	sigset_t all, now;
	struct sigaction action;
	int numbers[] = {SIGBUS, SIGSEGV, SIGILL, SIGUSR1};
	for (int i = 0; i < 4; i++) handle(numbers[i]);
	sigfillset(&all);
	CHECK(!sigprocmask(SIG_SETMASK, &all, NULL));
	raise(SIGUSR1);
	sweep(0, PASSES);
	CHECK(!sigprocmask(SIG_SETMASK, NULL, &now));
	for (int i = 0; i < 4; i++) {
		CHECK(sigismember(&now, numbers[i]));
		CHECK(!sigaction(numbers[i], NULL, &action) && action.sa_handler == handler);
	}
	CHECK(!handled);
}

/* Two signals are as far apart as ten pages take, and a sweep has ten at most: otherwise a slow
 * machine would handle signals and do nothing else. */
static struct itimerval soon;
static volatile sig_atomic_t left, set;
static void again(int number)
{
	(void)number;
	handled++;
	set = left-- > 0;
	if (set) setitimer(ITIMER_REAL, &soon, NULL);
}

static void timer(void)
{
	struct timespec begin, end;
	struct itimerval never = {{0, 0}, {0, 0}};
	struct sigaction action = {.sa_handler = again, .sa_flags = SA_RESTART};
	sweep(0, 1);
	CHECK(!clock_gettime(CLOCK_MONOTONIC, &begin));
	sweep(1, 3);
	CHECK(!clock_gettime(CLOCK_MONOTONIC, &end));
	long us = (end.tv_sec - begin.tv_sec) * 1000000 + (end.tv_nsec - begin.tv_nsec) / 1000;
	us = 10 * us / (long)(2 * data_pages);
	soon.it_value = (struct timeval){0, us < 300 ? 300 : us < 900000 ? us : 900000};
	CHECK(!sigaction(SIGALRM, &action, NULL));
	for (int pass = 3; pass < 3 * PASSES || !handled; pass++) {
		left = 9;
		if (!set) {
			set = 1;
			CHECK(!setitimer(ITIMER_REAL, &soon, NULL));
		}
		sweep(pass, pass + 1);
	}
	CHECK(!setitimer(ITIMER_REAL, &never, NULL));
	CHECK(handled > 0);
}

static void *visitor(void *number)
{
	int thread = (int)(long)number;
	for (int pass = 0; pass < PASSES; pass++)
		for (uint64_t page = 0; page < data_pages; page++) {
			uint64_t at = data + page * PAGE + 8 * (thread + 1);
			CHECK(get(thread, at) == (uint64_t)pass);
			put(thread, at, pass + 1);
		}
	return NULL;
}

static void together(void)
{
	pthread_t threads[THREADS];
	for (long i = 0; i < THREADS; i++) CHECK(!pthread_create(&threads[i], NULL, visitor, (void *)i));
	for (int i = 0; i < THREADS; i++) CHECK(!pthread_join(threads[i], NULL));
}

static void *sender(void *to)
{
	/* So many: without an end a slow machine could be too busy with them to end the last sweep. */
	for (int i = 0; i < 200 && !done; i++) {
		CHECK(!pthread_kill(*(pthread_t *)to, SIGUSR1));
		usleep(500);
	}
	return NULL;
}

static void asked(void)
{
	pthread_t self = pthread_self(), other;
	pid_t pid = getpid(), child = fork();
	CHECK(child >= 0);
	if (!child) {
		for (int i = 0; i < 20; i++) {
			kill(pid, SIGSTOP);
			usleep(1000);
			kill(pid, SIGCONT);
			usleep(2000);
		}
		_exit(0);
	}
	handle(SIGUSR1);
	CHECK(!pthread_create(&other, NULL, sender, &self));
	int status;
	while (waitpid(child, &status, WNOHANG) == 0) {
		struct run run;
		static uint64_t pass;
		CHECK(!call(0, SWEEP, data, data_pages, pass++, &run) && run.function == 4);
	}
	done = 1;
	CHECK(!pthread_join(other, NULL) && handled > 0);
}

static void system_call(void)
{
	struct run run;
	int pipes[2];
	CHECK(!pipe(pipes));
	for (uint64_t pass = 0; pass < PASSES; pass++) {
		CHECK(!call(0, SWEEP, data, data_pages, pass, &run) && run.function == 4);
		/* The first page has left the EPC since. */
		CHECK(write(pipes[1], (void *)data, 8) == -1 && errno == EFAULT);
	}
}

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	file = argv[1];
	enter = find_enter();
	build();
	switch (argv[2][0]) {
	case 'b': blocked(); break;
	case 't': argv[2][1] == 'i' ? timer() : together(); break;
	case 'a': asked(); break;
	case 's': system_call(); break;
	}
	return 0;
}
