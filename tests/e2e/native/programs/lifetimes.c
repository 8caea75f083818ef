/*
 * Lives of processes that use enclaves, chosen by a seed: how each begins, what it does and how it ends.
 * usage: lifetimes ENCLAVE SEED LIVES AT_ONCE; exit status 0 says that every life went as hardware and Linux have it.
 * Prints how many there were, and how many of them SIGKILL has ended.
 * A life that was executed: lifetimes ENCLAVE SEED live.
 */
#include "sgx.h"
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/resource.h>

/* Which thread of its enclave does what; a thread of the parent's enclave is used by one life at a time. */
enum { MAIN, FIRST_INSIDE, LAST_INSIDE = 3, HELPER, ORPHAN, TCS_COUNT };
#define LONGEST_US 3000

static uint64_t state;
static int shared; /* the enclave is the parent's: earlier lives may have been killed in its threads */
static int own = MAIN; /* the thread that is used by the life itself */
static volatile int ending;
static char **arguments;
extern char **environ;

static uint64_t rnd(void)
{
	state ^= state << 13; state ^= state >> 7; state ^= state << 17;
	return state * 0x2545f4914f6cdd1d >> 11;
}
static uint64_t below(uint64_t n) { return rnd() % n; }
static uint64_t mixed(uint64_t seed, uint64_t n) { return (seed * 0x9e3779b97f4a7c15 + n) * 0xbf58476d1ce4e5b9 | 1; }

/* A call; 0: threads that were killed in it have used the TCS up. */
static int try(int thread, int op, uint64_t rdi, uint64_t rsi, uint64_t r8)
{
	struct run run;
	int ret = call(thread, op, rdi, rsi, r8, &run);
	if (!ret && run.function == 4) return 1;
	if (shared && !ret && run.function == 2 && run.vector == 13) return 0;
	if (ending) return 0; /* its memory is being taken away */
	fprintf(stderr, "thread %d, operation %d: result %d function %u vector %u code %x address %lx\n",
		thread, op, ret, run.function, run.vector, run.code, run.address);
	exit(90);
}

static void work(int thread, uint64_t rounds)
{
	for (uint64_t i = 0; i < rounds && !ending; i++) {
		uint64_t at = data + below(data_pages) * PAGE + 8 * thread, value = rnd(), back = value;
		if (!try(thread, PUT, at, value, 0)) continue;
		if (below(4) == 0) try(thread, SPIN, 1 + below(20000), 0, 0);
		if (!try(thread, GET, at, 0, (uint64_t)&back)) continue;
		if (!shared && back != value) { fprintf(stderr, "%lx: %lx, not %lx\n", at, back, value); exit(91); }
	}
}

static void *inside(void *arg)
{
	int thread = (long)arg;
	while (!ending) {
		uint64_t at = data + below(data_pages) * PAGE + 8 * thread;
		try(thread, PUT, at, at, 0);
		try(thread, SPIN, 1 + below(200000), 0, 0);
	}
	return NULL;
}

static int reap(pid_t pid)
{
	int status;
	while (waitpid(pid, &status, 0) != pid) if (errno != EINTR) return -1;
	return status;
}

static void nap(void) { usleep(below(LONGEST_US)); }

static void helper(void)
{
	char *words[] = {"sh", "-c", "exit 3", NULL};
	pid_t pid;
	switch (below(4)) {
	case 0: CHECK(WEXITSTATUS(system("exit 3")) == 3); break;
	case 1: CHECK(!posix_spawn(&pid, "/bin/sh", NULL, NULL, words, environ) && WEXITSTATUS(reap(pid)) == 3); break;
	case 2:
		pid = vfork();
		if (!pid) _exit(4);
		CHECK(pid > 0 && WEXITSTATUS(reap(pid)) == 4);
		break;
	default:
		pid = fork();
		if (!pid) { if (!shared) work(HELPER, below(3)); _exit(5); }
		CHECK(pid > 0 && WEXITSTATUS(reap(pid)) == 5);
	}
}

static void end(void)
{
	char seed[32];
	struct run run;
	sprintf(seed, "%lu", rnd() >> 20 | 1);
	switch (below(16)) {
	case 0: exit(0);
	case 1: _exit(0);
	case 2: kill(getpid(), SIGKILL); for (;;) pause();
	case 3: kill(getpid(), SIGTERM); for (;;) pause();
	case 4: abort();
	case 5: ending = 1; munmap((void *)base, size); close(device); _exit(0);
	case 6: close(device); _exit(0);
	case 7: execl("/proc/self/exe", arguments[0], file, seed, "live", NULL); _exit(92);
	case 8: execl("/bin/true", "true", NULL); _exit(92);
	case 9: if (!fork()) { nap(); if (!shared) work(ORPHAN, below(8)); _exit(0); } _exit(0); /* an orphan */
	case 10: if (!vfork()) { execl("/bin/true", "true", NULL); _exit(92); } _exit(0);
	case 11: pthread_exit(NULL); /* the leader; the others go on until the parent kills */
	case 12: ending = 1; call(own, UD2, 0, 0, 0, &run); __builtin_trap();
	case 13: if (shared) _exit(0); ending = 1; raw_enter(base + own * PAGE, 0, 0, UD2, 0); _exit(0); /* SIGILL */
	case 14: kill(getpid(), SIGSTOP); nap(); _exit(0);
	default: for (;;) work(own, 1000); /* until the parent kills */
	}
}

static void live(int slot)
{
	uint64_t threads = below(1 + LAST_INSIDE);
	struct rlimit none = {0, 0};
	setrlimit(RLIMIT_CORE, &none);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	shared = slot < TCS_COUNT && device && below(2);
	if (shared) own = slot;
	else build();
	for (uint64_t t = FIRST_INSIDE; !shared && t < FIRST_INSIDE + threads; t++) {
		pthread_t id;
		CHECK(!pthread_create(&id, NULL, inside, (void *)t));
	}
	work(own, below(20));
	if (below(3) == 0) helper();
	if (below(3) == 0) nap();
	work(own, below(10));
	end();
}

/* How a life may end; whatever else is the supervisor's mistake, or ours. */
static int expected(int status)
{
	if (WIFEXITED(status)) return WEXITSTATUS(status) == 0;
	switch (WTERMSIG(status)) {
	case SIGKILL: case SIGTERM: case SIGABRT: case SIGILL: return 1;
	default: return 0;
	}
}

int main(int argc, char **argv)
{
	CHECK(argc >= 4);
	arguments = argv;
	file = argv[1]; enter = find_enter();
	CHECK(enter);
	uint64_t seed = strtoull(argv[2], NULL, 0);
	if (!strcmp(argv[3], "live")) { state = mixed(seed, 1); live(0); }
	long lives = atol(argv[3]), at_once = atol(argv[4]), begun = 0, ended = 0, running = 0, killed = 0;
	pid_t pids[64] = {0};
	CHECK(at_once >= 1 && at_once <= 64);
	state = mixed(seed, 0);
	build();
	while (ended < lives) {
		while (running < at_once && begun < lives) {
			if (begun % 16 == 15) { munmap((void *)base, size); close(device); build(); }
			long slot = 0;
			while (pids[slot]) slot++;
			pid_t pid = fork();
			CHECK(pid >= 0);
			if (!pid) { state = mixed(seed, 2 + begun); live(slot); }
			pids[slot] = pid; running++; begun++;
		}
		nap();
		long victim = below(at_once);
		if (pids[victim] && below(2)) kill(pids[victim], SIGKILL);
		if (pids[victim]) kill(pids[victim], SIGCONT);
		int status;
		for (long slot = 0; slot < at_once; slot++) {
			if (!pids[slot] || waitpid(pids[slot], &status, WNOHANG) != pids[slot]) continue;
			if (!expected(status)) { fprintf(stderr, "a life ended with status %x\n", status); exit(93); }
			pids[slot] = 0; running--; ended++;
			killed += WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
		}
	}
	printf("%ld %ld\n", ended, killed);
	return 0;
}
