/* Where EENTER arrives and EEXIT leaves.
 *
 * On arrival RAX is CSSA, RBX the TCS, RCX the address to leave to; RDI, RSI, RDX are the call's.
 * Everything else is the host's and untrusted, RSP and the flags above all.  The stack of a thread
 * ends where its TCS begins, so RBX, which the processor vouches for, finds it without any
 * memory of the host's.  An interrupt may come between any two instructions: what it saves in
 * the SSA frame is resumed as it was.
 *
 * Source:
 *     SDM vol. 3D, "EENTER", "EEXIT"; System V ABI, AMD64 supplement, "Register Usage".
 */

#define EEXIT 4
#define STATUS_BUSY 1           /* SGX__BUSY of softsgx.h */
#define FLAGS_AC_DF 0x40400     /* alignment checks, backward strings */

    .section .sgx.entry, "ax", @progbits
    .globl  sgx_entry
    .hidden sgx_entry
    .type   sgx_entry, @function
sgx_entry:
    /* An exception of an earlier call holds this thread's stack: leave it alone. */
    testl   %eax, %eax
    jnz     .Lbusy

    movq    %rsp, %rax
    movq    %rbx, %rsp
    pushq   %rax                /* what the host gets back: its stack pointer, */
    pushq   %rcx                /* where to leave to, */
    pushq   %rbp                /* and what its ABI lets it expect */
    pushq   %r12
    pushq   %r13
    pushq   %r14
    pushq   %r15
    pushq   $0
    stmxcsr (%rsp)
    fnstcw  4(%rsp)

    pushfq
    andq    $~FLAGS_AC_DF, (%rsp)
    popfq
    fxrstor64 .Lclean(%rip)
    movq    %rbx, %rcx
    xorl    %ebp, %ebp
    call    sgx__dispatch       /* 8 pushes below a page boundary: aligned to 16 */

    movq    %rax, %rdi          /* the result, */
    movq    %rdx, %rsi          /* and whether there is one */
    fxrstor64 .Lclean(%rip)     /* no x87, MMX or XMM register tells anything */
    ldmxcsr (%rsp)
    fldcw   4(%rsp)
    addq    $8, %rsp
    popq    %r15
    popq    %r14
    popq    %r13
    popq    %r12
    popq    %rbp
    popq    %rbx
    popq    %rsp
.Lleave:
    xorl    %ecx, %ecx
    xorl    %edx, %edx
    xorl    %r8d, %r8d
    xorl    %r9d, %r9d
    xorl    %r10d, %r10d
    xorl    %r11d, %r11d
    movl    $EEXIT, %eax
    .byte   0x0f, 0x01, 0xd7    /* ENCLU: assemblers know it by different names, or not at all */
    ud2

.Lbusy:
    movq    %rcx, %rbx
    xorl    %edi, %edi
    movl    $STATUS_BUSY, %esi
    jmp     .Lleave
    .size   sgx_entry, . - sgx_entry

    /* FXRSTOR's image of a processor after reset, as the ABI has it at function entry. */
    .balign 16
.Lclean:
    .word   0x037f              /* FCW: all exceptions masked, 64-bit precision */
    .zero   22
    .long   0x1f80              /* MXCSR: all exceptions masked, to nearest */
    .zero   484

    .section .note.GNU-stack, "", @progbits
