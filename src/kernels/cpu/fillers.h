/* Every function that overrides entries of the table with the copies compiled for one instruction set.
 *
 * Each is the one public function of a file in kernels/cpu/isa/ (see isa.h); kernels/cpu/cpu.c calls them. Which copies this
 * program has, cmake/folder.cmake says: CADRE_ISA_AVX2, ...
 */
#pragma once

#include "kernels/kernels.h"

/* DO(file, isa) for each of these files. */
#define FOR_EACH_FILLER(DO, isa)                                                                              \
    DO(product, isa) DO(attention, isa) DO(norm, isa) DO(pointwise, isa) DO(router, isa) DO(loss, isa)        \
    DO(adamw, isa) DO(roof, isa) DO(box, isa) DO(outer, isa)

#define DECLARE_FILLER(file, isa) void file##_fill_##isa(struct kernel_ops *ops);

FOR_EACH_FILLER(DECLARE_FILLER, portable)
#ifdef CADRE_ISA_AVX2
FOR_EACH_FILLER(DECLARE_FILLER, avx2)
#endif
#ifdef CADRE_ISA_AVX512
FOR_EACH_FILLER(DECLARE_FILLER, avx512)
#endif
#ifdef CADRE_ISA_AVX512BF16
FOR_EACH_FILLER(DECLARE_FILLER, avx512bf16)
#endif
#ifdef CADRE_ISA_AMX
FOR_EACH_FILLER(DECLARE_FILLER, amx)
#endif
#ifdef CADRE_ISA_AMXMODEL /* amx with the tiles in software, for tests */
FOR_EACH_FILLER(DECLARE_FILLER, amxmodel)
#endif
