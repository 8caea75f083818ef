/* Ways to enter an enclave: by the vDSO, or by ENCLU of our own with the flags of the caller. */

#define WAY(name, load) extern enter_t name; __asm__(".text\n" #name ":\n push %rbp\n mov %rsp,%rbp\n push %rbx\n mov 16(%rbp),%rbx\n mov (%rbx),%rbx\n" \
	load " .byte 0x0f,0x01,0xd7\n mov 16(%rbp),%rbx\n movl $4,8(%rbx)\n mov -8(%rbp),%rbx\n leave\n mov $0,%eax\n ret\n")
WAY(own, " lea own_aep(%rip),%rcx\n mov $2,%eax\n");
__asm__("own_aep: .byte 0x0f,0x01,0xd7\n");
/* With as much behind the load of EAX as may be there, and an AEP that counts. */
WAY(gap, " .byte 0x48,0xc7,0xc0,2,0,0,0\n lea gap_aep(%rip),%rcx\n mov %rbx,%r11\n mov -8(%rbp),%r11\n mov (%rsp),%r11\n mov $7,%r11d\n");
uint64_t exits;
__asm__("gap_aep: lock incq exits(%rip)\n .byte 0x0f,0x01,0xd7\n");
/* With any AEP. */
extern char own_aep[];
uint64_t any_aep;
WAY(any, " mov any_aep(%rip),%rcx\n mov $2,%eax\n");
/* It always stops. */
WAY(far, " lea far_aep(%rip),%rcx\n mov $2,%eax\n jmp 1f\n1:\n");
__asm__("far_aep: .byte 0x0f,0x01,0xd7\n");

/* Return the way that `mode`, WAY:MODE or MODE, starts with, and remove it there. */
static inline enter_t *find_way(char **mode)
{
	static const struct { const char *name; enter_t *enter; } ways[] = {{"own:", own}, {"gap:", gap}, {"far:", far}};
	for (int i = 0; i < 3; i++)
		if (!strncmp(*mode, ways[i].name, 4)) {
			*mode += 4;
			return ways[i].enter;
		}
	return find_enter();
}
