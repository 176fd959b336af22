/*
 * The guest of virtio-balloon-kvm-test: it writes to pages when told
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * This is the end of a ROM that takes the place of the BIOS, and it is executed
 * there.  So the test alone uses fw_cfg and the PCI bus, memory that the test
 * does not name is not written, and the guest is ready at once.
 *
 * To update the header:
 *
 *     cc -m32 -march=i486 -c virtio-balloon-bootblock.S -o bootblock.o
 *     objcopy -O binary bootblock.o bootblock
 *     (sed '/^$/q' virtio-balloon-bootblock.h
 *      nm bootblock.o | sed -n 's/\(.*\) a \(guest.*\)/#define \U\2\E 0x\1/p'
 *      xxd -i bootblock | sed '/_len/d; s/^unsigned/\nstatic const &/') >header
 *     mv header virtio-balloon-bootblock.h
 *     rm bootblock bootblock.o
 */

/*
 * Words in memory.  While fewer passes are done than requested, the guest
 * increments the first word of each step between start and end, and then the
 * number of passes that are done.
 */
.set guest_request, 0x7000
.set guest_done, 0x7004
.set guest_start, 0x7008
.set guest_end, 0x700c
.set guest_step, 0x7010

/* The ROM ends at 4 GiB. */
.set base, 0xffffff00

.text
.code32
begin:
        mov $16, %eax
        mov %eax, %ds
wait:
        pause
        mov guest_done, %eax
        cmp guest_request, %eax
        jae wait
        mov guest_start, %ebx
        mov guest_end, %ecx
        mov guest_step, %edx
pass:
        incl (%ebx)
        add %edx, %ebx
        cmp %ecx, %ebx
        jb pass
        incl guest_done
        jmp wait

        /* The CPU need not set the accessed bits, which are in the ROM. */
        .balign 8
gdt:
        .quad 0
        /* code: base 0, limit 4 GiB, 32 bits */
        .quad 0x00cf9b000000ffff
        /* data, likewise */
        .quad 0x00cf93000000ffff
gdt_desc:
        .word gdt_desc - gdt - 1
        .long base + gdt - begin

.code16
real:
        /* The base of %cs is 0xffff0000. */
        lgdtl %cs:(base + gdt_desc - begin) & 0xffff
        mov %cr0, %eax
        or $1, %al
        mov %eax, %cr0
        ljmpl $8, $(base)

        /* The CPU starts here. */
        .org 0xf0
        jmp real
        .org 0x100
