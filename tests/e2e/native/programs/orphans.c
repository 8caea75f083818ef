/*
 * Processes that end while one of their threads is inside fork: the child runs all the same.  Each
 * child has the end of a pipe, so the pipe ends when all of them have.  With a third argument they
 * have an open device.  "orphans sister 0": a process makes a child of its own parent,
 * and is killed in that.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) { fprintf(stderr, "%d: %s\n", __LINE__, #what); _exit(1); } } while (0)

static int told;
static volatile int started;

static void *forks(void *unused)
{
	signal(SIGCHLD, SIG_IGN);
	if (write(told, "x", 1) != 1) _exit(1);
	started = 1;
	for (;;) if (!fork()) _exit(0);
	return unused;
}

static void pass_time(int turn)
{
	struct timespec time = {0, 200000 + 37000 * (turn % 50)};
	nanosleep(&time, NULL);
}

static void ends(const char *how, int turn)
{
	pthread_t thread;
	if (!strcmp(how, "killed")) forks(NULL);
	CHECK(!pthread_create(&thread, NULL, forks, NULL));
	while (!started);
	pass_time(turn);
	if (!strcmp(how, "executes")) execl("/bin/true", "true", NULL);
	_exit(0);
}

/* Both have ended: one was killed, and the other has run. */
static void has_sister(void)
{
	int killed = 0, ran = 0, status;
	if (!fork()) {
		long made = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
		_exit(made ? 1 : 23);
	}
	for (int child = 0; child < 2; child++) {
		CHECK(wait(&status) > 0);
		killed += WIFSIGNALED(status);
		ran += WIFEXITED(status) && WEXITSTATUS(status) == 23;
	}
	CHECK(killed == 1 && ran == 1);
}

int main(int count, char **arguments)
{
	CHECK(count == 3 || (count == 4 && open(arguments[3], O_RDWR) >= 0));
	if (!strcmp(arguments[1], "sister")) has_sister();
	for (int turn = 0; turn < atoi(arguments[2]); turn++) {
		int pipes[2], status, pid;
		char byte;
		CHECK(!pipe(pipes) && (pid = fork()) >= 0);
		if (!pid) {
			close(pipes[0]);
			told = pipes[1];
			ends(arguments[1], turn);
		}
		close(pipes[1]);
		CHECK(read(pipes[0], &byte, 1) == 1);
		if (!strcmp(arguments[1], "killed")) {
			pass_time(turn);
			kill(pid, SIGKILL);
		}
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(!read(pipes[0], &byte, 1) && !close(pipes[0]));
	}
	return 0;
}
