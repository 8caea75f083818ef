/* turns THREADS CALLS: threads that stop all the time, by a call on a device; prints how often each has. */
#include "sgx.h"

enum { MOST = 16 };
static volatile uint64_t made[MOST][8]; /* each in a cache line of its own */
static volatile uint64_t left;

static void *caller(void *number)
{
	uint64_t self = (uint64_t)number;
	for (; (int64_t)__atomic_sub_fetch(&left, 1, __ATOMIC_RELAXED) >= 0; made[self][0]++)
		CHECK(ioctl(device, 0xa4ff) == -1);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[MOST];
	CHECK(argc == 3);
	uint64_t number = strtoul(argv[1], NULL, 10);
	left = strtoul(argv[2], NULL, 10);
	device = open("/dev/sgx_enclave", O_RDWR);
	CHECK(number && number <= MOST && device >= 0);
	for (uint64_t n = 0; n < number; n++) CHECK(!pthread_create(&threads[n], NULL, caller, (void *)n));
	for (uint64_t n = 0; n < number; n++) CHECK(!pthread_join(threads[n], NULL));
	for (uint64_t n = 0; n < number; n++) printf("%lu ", made[n][0]);
	return 0;
}
