/* How the sources in kernels/cpu/isa become one copy for each instruction set.
 *
 * Each file there is compiled once for every instruction set (cmake/folder.cmake) with CADRE_ISA as its name. All its
 * functions are static but one, a filler that overrides entries of the table; ISA_NAME gives it a name of its own:
 * ISA_NAME(product_fill) is product_fill_avx512 in the avx512 copy. kernels/cpu/cpu.c declares and calls them.
 */
#pragma once

#define ISA_JOIN2(name, isa) name##_##isa
#define ISA_JOIN(name, isa) ISA_JOIN2(name, isa)
#define ISA_NAME(name) ISA_JOIN(name, CADRE_ISA)
