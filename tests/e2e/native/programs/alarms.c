/*
 * alarms ENCLAVE THREADS MICROSECONDS CALLS COUNT: threads inside that get signals all the time.
 *
 * Each thread has a timer of so many microseconds, and makes so many calls.  A call counts down from
 * COUNT inside; the last one raises #UD.  Meanwhile the first thread gets queued signals.  Handlers
 * find the signal mask of their thread, and so does the thread behind each call.  Prints how many
 * signals of its timer each thread has got.
 */
#include "sgx.h"
#include <time.h>

enum { MOST = 16, QUEUED = 300, SECONDS = 100 };
static uint64_t calls, count, microseconds;
static volatile uint64_t got[MOST], queued;
static volatile int over;
static __thread uint64_t self;
static sigset_t blocked; /* by all threads, always */

/* A handler may find signals of faults unblocked that its thread has blocked outside the enclave. */
static void look(const sigset_t *mask, int in_handler)
{
	uint64_t faults = 1ul << (SIGILL - 1) | 1ul << (SIGTRAP - 1) | 1ul << (SIGBUS - 1) | 1ul << (SIGFPE - 1) | 1ul << (SIGSEGV - 1);
	uint64_t has = *(const uint64_t *)mask, wanted = *(const uint64_t *)&blocked;
	CHECK(in_handler ? (has | faults) == (wanted | faults) : has == wanted);
}

static void alarmed(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info;
	look(&((ucontext_t *)context)->uc_sigmask, 1);
	got[self]++;
}

static void received(int number, siginfo_t *info, void *context)
{
	(void)number;
	look(&((ucontext_t *)context)->uc_sigmask, 1);
	CHECK((uint64_t)info->si_value.sival_int == queued);
	queued++;
}

static void *caller(void *number)
{
	timer_t timer;
	sigset_t mask;
	struct run run;
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};
	struct itimerspec every = {.it_value.tv_nsec = 1000 * microseconds, .it_interval.tv_nsec = 1000 * microseconds};
	self = (uint64_t)number;
	event._sigev_un._tid = syscall(SYS_gettid);
	CHECK(!timer_create(CLOCK_MONOTONIC, &event, &timer) && !timer_settime(timer, 0, &every, NULL));
	for (uint64_t i = 0; i < calls; i++) {
		int illegal = i == calls - 1; /* its frame in the SSA stays in use */
		CHECK(!call(self, illegal ? UD2 : SPIN, count, 0, 0, &run));
		CHECK(illegal ? run.function == 3 && run.vector == 6 : run.function == 4);
		CHECK(!pthread_sigmask(SIG_BLOCK, NULL, &mask));
		look(&mask, 0);
	}
	CHECK(!timer_delete(timer));
	if (!self) over = 1;
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction alarm = {.sa_sigaction = alarmed, .sa_flags = SA_RESTART | SA_SIGINFO};
	struct sigaction queue = {.sa_sigaction = received, .sa_flags = SA_RESTART | SA_SIGINFO};
	struct timespec until, some = {.tv_nsec = 100000};
	pthread_t threads[MOST];
	sigset_t all;
	CHECK(argc == 6);
	uint64_t number = strtoul(argv[2], NULL, 10);
	file = argv[1], microseconds = strtoul(argv[3], NULL, 10);
	calls = strtoul(argv[4], NULL, 10), count = strtoul(argv[5], NULL, 10);
	sigfillset(&alarm.sa_mask), sigfillset(&queue.sa_mask), sigfillset(&all);
	CHECK(number && number <= MOST && !sigaction(SIGALRM, &alarm, NULL) && !sigaction(SIGRTMIN, &queue, NULL));
	enter = find_enter();
	CHECK(enter);
	build();
	sigemptyset(&blocked), sigaddset(&blocked, SIGUSR1), sigaddset(&blocked, SIGFPE);
	CHECK(!pthread_sigmask(SIG_SETMASK, &blocked, NULL) && !clock_gettime(CLOCK_REALTIME, &until));
	until.tv_sec += SECONDS;
	for (uint64_t n = 0; n < number; n++) CHECK(!pthread_create(&threads[n], NULL, caller, (void *)n));
	CHECK(!pthread_sigmask(SIG_BLOCK, &all, NULL));
	for (int n = 0; n < QUEUED && !over; n++) {
		union sigval value = {.sival_int = n};
		CHECK(!pthread_sigqueue(threads[0], SIGRTMIN, value) && !nanosleep(&some, NULL));
	}
	for (uint64_t n = 0; n < number; n++) CHECK(!pthread_timedjoin_np(threads[n], NULL, &until));
	for (uint64_t n = 0; n < number; n++) printf("%lu ", got[n]);
	printf("%lu\n", queued);
	return 0;
}
