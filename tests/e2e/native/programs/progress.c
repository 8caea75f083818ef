/*
 * progress ENCLAVE MODE THREADS CALLS MICROSECONDS: threads that need more EPC pages than there are.
 *
 *     border    each call stores over the border of two pages of its thread, two others each time
 *     augment   each call makes a page by EAUG and EACCEPT, and stores to it
 *
 * A thread has a timer of so many microseconds, whose handler does nothing; 0: none.  Prints the
 * calls that ended.
 */
#include "sgx.h"
#include <time.h>

enum { MOST = 16, PAGES = 16 /* of a thread */ };
static uint64_t calls_of_each, microseconds;
static int augments;

static void ignore(int number) { (void)number; }

static void store_over_border(uint64_t self, uint64_t i)
{
	uint64_t at = data + (self * PAGES + 2 * i % PAGES) * PAGE + PAGE - 4, value = self << 32 | i;
	put(self, at, value);
	CHECK(get(self, at) == value);
}

/* The first page of a thread's data has the SECINFO. */
static void accept_another(uint64_t self, uint64_t i)
{
	uint64_t info = data + self * PAGES * PAGE, result = 0;
	uint64_t page = data + (data_pages + self * calls_of_each + i) * PAGE;
	struct run run;
	CHECK(page + PAGE <= base + size);
	CHECK(!call(self, ACCEPT, page, info, (uint64_t)&result, &run) && run.function == 4 && !result);
	put(self, page, i);
}

static void *caller(void *number)
{
	uint64_t self = (uint64_t)number;
	timer_t timer;
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};
	struct itimerspec every = {.it_value.tv_nsec = 1000 * microseconds, .it_interval.tv_nsec = 1000 * microseconds};
	event._sigev_un._tid = syscall(SYS_gettid);
	CHECK(!timer_create(CLOCK_MONOTONIC, &event, &timer) && !timer_settime(timer, 0, &every, NULL));
	if (augments) put(self, data + self * PAGES * PAGE, 0x20b /* PENDING, REG, R and W */);
	for (uint64_t i = 0; i < calls_of_each; i++) (augments ? accept_another : store_over_border)(self, i);
	CHECK(!timer_delete(timer));
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = ignore, .sa_flags = SA_RESTART};
	pthread_t others[MOST];
	CHECK(argc == 6 && !sigaction(SIGALRM, &action, NULL));
	uint64_t threads = strtoul(argv[3], NULL, 10);
	file = argv[1], augments = !strcmp(argv[2], "augment");
	calls_of_each = strtoul(argv[4], NULL, 10), microseconds = strtoul(argv[5], NULL, 10);
	enter = find_enter();
	CHECK(threads && threads <= MOST && enter);
	build();
	uint64_t end = data + data_pages * PAGE;
	if (augments) CHECK(mmap((void *)end, base + size - end, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, device, 0) != MAP_FAILED);
	for (uint64_t n = 0; n < threads; n++) CHECK(!pthread_create(&others[n], NULL, caller, (void *)n));
	for (uint64_t n = 0; n < threads; n++) CHECK(!pthread_join(others[n], NULL));
	printf("%lu\n", threads * calls_of_each);
	return 0;
}
