/*
 * counts ENCLAVE [WAY:]MODE …: threads that call an enclave, and how often they did.
 *
 *     many THREADS ROUNDS CALLS MICROSECONDS         prints how many calls ended, and how many signals came
 *     killed PROCESSES THREADS CALLS MICROSECONDS    prints a line a process: calls begun,
 *         at most and at least how many stores of calls from inside, calls ended
 *
 * Every thread has a timer of so many microseconds, whose handler calls the enclave too, and gets
 * signals of the others.  It sets the timer again when it has made a call since: on a slow machine
 * it would handle signals and do nothing else.  Calls leave in turn by both forms of exit; some have
 * an exception inside.
 */
#include "sgx.h"
#include "ways.h"
#include <time.h>

/* A thread has at most one call in progress on each level. */
enum { CALL, MEND, HANDLER, LEVELS, TCS_OF_HANDLERS = 8, FRAMES_AT = 16, MOST = 8 };
struct count { volatile uint64_t begun, stored, ended; };
struct tally { struct count levels[LEVELS]; volatile uint64_t signals; };
static struct tally *tallies;
static uint64_t calls_of_each, microseconds, crowd_size;
static volatile pid_t tids[MOST];
static __thread uint64_t self;
static __thread volatile sig_atomic_t mending;

/* One call, which stores in `stored` from inside. */
static void store(int level, int tcs, int operation)
{
	struct count *count = &tallies[self].levels[level];
	struct run run;
	count->begun++;
	CHECK(!call(tcs, operation, (uint64_t)&count->stored, count->begun, 0, &run) && run.function == 4);
	count->ended++;
}

/* Calls that read and write a word of the enclave: no trace outside shows when they are inside. */
static uint64_t reach(int operation, uint64_t at, uint64_t value)
{
	struct count *count = &tallies[self].levels[MEND];
	struct run run;
	count->begun++;
	CHECK(!call(self, operation, at, value, (uint64_t)&value, &run) && run.function == 4);
	count->ended++;
	return value;
}

/* A call with #UD inside: the thread mends RIP in the frame by two more calls, and resumes. */
static void mend(void)
{
	uint64_t rip = base + (FRAMES_AT + 2 * self) * PAGE + PAGE - 184 + 136;
	struct count *count = &tallies[self].levels[CALL];
	struct run run;
	mending = 1;
	by = find_enter();
	count->begun++;
	CHECK(!call(self, VECTOR, 0, count->begun, (uint64_t)&count->stored, &run) && run.function == 3 && run.vector == 6);
	reach(PUT, rip, reach(GET, rip, 0) + 2);
	CHECK(!go(self, 3, 0, 0, 0, 0, &run) && run.function == 4);
	count->ended++;
	by = NULL;
	mending = 0;
}

/* It enters by a TCS of its own, or by the second frame of that which the thread may be inside of. */
static void handle(int number)
{
	uint64_t signals = ++tallies[self].signals;
	int error = errno;
	(void)number;
	store(HANDLER, signals % 2 && !mending ? self : TCS_OF_HANDLERS + self, signals % 4 < 2 ? LEAVE : PUT);
	errno = error;
}

static void *caller(void *number)
{
	timer_t timer;
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};
	struct itimerspec once = {.it_value.tv_nsec = 1000 * microseconds};
	self = (uint64_t)number;
	event._sigev_un._tid = tids[self] = syscall(SYS_gettid);
	CHECK(!timer_create(CLOCK_MONOTONIC, &event, &timer));
	uint64_t signals = -1;
	for (uint64_t i = 0; i < calls_of_each; i++) {
		if (tallies[self].signals != signals) {
			signals = tallies[self].signals;
			CHECK(!timer_settime(timer, 0, &once, NULL));
		}
		if (i % 4096 == 4095) mend();
		else store(CALL, self, i % 2 ? LEAVE : PUT);
		if (i % 65536 == 1) syscall(SYS_tgkill, getpid(), tids[i / 65536 % crowd_size], SIGUSR1);
	}
	CHECK(!timer_delete(timer));
	return NULL;
}

static void prepare(uint64_t threads)
{
	struct sigaction action = {.sa_handler = handle, .sa_flags = SA_RESTART};
	CHECK(threads && threads <= MOST);
	crowd_size = threads;
	sigaddset(&action.sa_mask, SIGUSR1);
	sigaddset(&action.sa_mask, SIGALRM);
	CHECK(!sigaction(SIGUSR1, &action, NULL) && !sigaction(SIGALRM, &action, NULL));
	build();
}

/* A crowd of threads; one alone is the first of its process. */
static void crowd(uint64_t threads)
{
	pthread_t others[MOST];
	if (threads == 1) caller(NULL);
	for (uint64_t n = 0; threads > 1 && n < threads; n++) CHECK(!pthread_create(&others[n], NULL, caller, (void *)n));
	for (uint64_t n = 0; threads > 1 && n < threads; n++) CHECK(!pthread_join(others[n], NULL));
}

struct sums { uint64_t begun, most, least, ended; };
static struct sums sum(const struct tally *of, uint64_t threads)
{
	struct sums all = {0};
	for (uint64_t n = 0; n < threads; n++)
		for (int level = 0; level < LEVELS; level++) {
			const struct count *one = &of[n].levels[level];
			CHECK(one->ended <= one->begun && one->begun <= one->ended + 1);
			all.begun += one->begun, all.most += level == MEND ? one->begun : one->stored;
			all.least += level == MEND ? one->ended : one->stored, all.ended += one->ended;
		}
	return all;
}

static void *shared(uint64_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED);
	return at;
}

static void many(uint64_t threads, uint64_t rounds)
{
	uint64_t signals = 0;
	tallies = shared(threads * sizeof *tallies);
	prepare(threads);
	for (uint64_t round = 0; round < rounds; round++) crowd(threads);
	struct sums all = sum(tallies, threads);
	for (uint64_t n = 0; n < threads; n++) signals += tallies[n].signals;
	CHECK(all.begun == all.ended);
	printf("%lu %lu\n", all.ended, signals);
}

static void killed(uint64_t processes, uint64_t threads, uint64_t least)
{
	struct tally *of_all = shared(processes * threads * sizeof *tallies);
	int status;
	calls_of_each = -1;
	for (uint64_t i = 0; i < processes; i++) {
		tallies = of_all + i * threads;
		pid_t child = fork();
		CHECK(child >= 0);
		if (!child) {
			prepare(threads);
			crowd(threads);
		}
		for (uint64_t n = 0; n < threads; n++) while (tallies[n].levels[CALL].ended < least + 37 * i) sched_yield();
		CHECK(!kill(child, SIGKILL) && waitpid(child, &status, 0) == child && WTERMSIG(status) == SIGKILL);
		struct sums all = sum(tallies, threads);
		printf("%lu %lu %lu %lu\n", all.begun, all.most, all.least, all.ended);
	}
}

int main(int argc, char **argv)
{
	uint64_t numbers[4];
	CHECK(argc == 7);
	for (int i = 0; i < 4; i++) numbers[i] = strtoul(argv[3 + i], NULL, 0);
	file = argv[1];
	enter = find_way(&argv[2]);
	CHECK(enter);
	microseconds = numbers[3];
	calls_of_each = numbers[2];
	if (!strcmp(argv[2], "killed")) killed(numbers[0], numbers[1], numbers[2]);
	else many(numbers[0], numbers[1]);
	return 0;
}
