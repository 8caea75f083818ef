/*
 * Tells of each key of the terminal that sends a signal, in the handler itself, and ends with 9
 * after two lines.  A shell runs its traps later: it does not see a signal that arrives after its
 * last look and before the call that waits for a line.
 */
#include <signal.h>
#include <string.h>
#include <unistd.h>

static void tell(int number)
{
	(void)!write(1, number == SIGINT ? "INT " : "QUIT ", number == SIGINT ? 4 : 5);
}

int main(void)
{
	struct sigaction action;
	char read_in;
	int lines = 0;
	memset(&action, 0, sizeof action);
	action.sa_handler = tell;
	action.sa_flags = SA_RESTART;
	if (sigaction(SIGINT, &action, NULL) || sigaction(SIGQUIT, &action, NULL)) return 1;
	if (write(1, "ready\n", 6) != 6) return 1;
	while (lines < 2) {
		if (read(0, &read_in, 1) != 1) return 1;
		lines += read_in == '\n';
	}
	return 9;
}
