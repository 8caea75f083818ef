/* orphan fork|clone: the child prints "child" if it has its parent's memory, and then the parent prints
 * "parent".  With clone, two children do that, and make children whose ends send no signals.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char memory[1 << 16];

static void make(int by_clone)
{
	if (by_clone ? (int)syscall(SYS_clone, 0, 0, 0, 0, 0) : fork())
		return;
	for (unsigned at = 0; at < sizeof memory; at++)
		if (memory[at] != 'x')
			_exit(1);
	_exit(write(1, "child\n", 6) != 6);
}

int main(int count, char **arguments)
{
	int by_clone = count > 1 && !strcmp(arguments[1], "clone");

	memset(memory, 'x', sizeof memory);
	for (int process = 0; process < 2 && by_clone; process++) {
		if (!fork()) {
			make(1);
			_exit(0);
		}
		wait(NULL);
	}
	if (!by_clone)
		make(0);
	wait(NULL);
	return write(1, "parent\n", 7) != 7;
}
