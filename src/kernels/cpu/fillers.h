/* Every function that overrides entries of the table with the copies compiled for one instruction set.
 *
 * Each is the one public function of a file in kernels/cpu/isa/ (see isa.h); kernels/cpu/cpu.c calls them.
 */
#pragma once

#include "kernels/kernels.h"

void product_fill_portable(struct kernel_ops *ops);
void attention_fill_portable(struct kernel_ops *ops);
void norm_fill_portable(struct kernel_ops *ops);
void pointwise_fill_portable(struct kernel_ops *ops);
void router_fill_portable(struct kernel_ops *ops);
void loss_fill_portable(struct kernel_ops *ops);
void box_fill_portable(struct kernel_ops *ops);
void adamw_fill_portable(struct kernel_ops *ops);
void roof_fill_portable(struct kernel_ops *ops);
void outer_fill_portable(struct kernel_ops *ops);

#ifdef CADRE_X86
void product_fill_avx2(struct kernel_ops *ops);
void attention_fill_avx2(struct kernel_ops *ops);
void norm_fill_avx2(struct kernel_ops *ops);
void pointwise_fill_avx2(struct kernel_ops *ops);
void router_fill_avx2(struct kernel_ops *ops);
void loss_fill_avx2(struct kernel_ops *ops);
void box_fill_avx2(struct kernel_ops *ops);
void adamw_fill_avx2(struct kernel_ops *ops);
void roof_fill_avx2(struct kernel_ops *ops);
void outer_fill_avx2(struct kernel_ops *ops);

void product_fill_avx512(struct kernel_ops *ops);
void attention_fill_avx512(struct kernel_ops *ops);
void norm_fill_avx512(struct kernel_ops *ops);
void pointwise_fill_avx512(struct kernel_ops *ops);
void router_fill_avx512(struct kernel_ops *ops);
void loss_fill_avx512(struct kernel_ops *ops);
void box_fill_avx512(struct kernel_ops *ops);
void adamw_fill_avx512(struct kernel_ops *ops);
void roof_fill_avx512(struct kernel_ops *ops);
void outer_fill_avx512(struct kernel_ops *ops);

void product_fill_avx512bf16(struct kernel_ops *ops);
void attention_fill_avx512bf16(struct kernel_ops *ops);
void norm_fill_avx512bf16(struct kernel_ops *ops);
void pointwise_fill_avx512bf16(struct kernel_ops *ops);
void router_fill_avx512bf16(struct kernel_ops *ops);
void loss_fill_avx512bf16(struct kernel_ops *ops);
void box_fill_avx512bf16(struct kernel_ops *ops);
void adamw_fill_avx512bf16(struct kernel_ops *ops);
void roof_fill_avx512bf16(struct kernel_ops *ops);
void outer_fill_avx512bf16(struct kernel_ops *ops);

void product_fill_amx(struct kernel_ops *ops);
void attention_fill_amx(struct kernel_ops *ops);
void norm_fill_amx(struct kernel_ops *ops);
void pointwise_fill_amx(struct kernel_ops *ops);
void router_fill_amx(struct kernel_ops *ops);
void loss_fill_amx(struct kernel_ops *ops);
void box_fill_amx(struct kernel_ops *ops);
void adamw_fill_amx(struct kernel_ops *ops);
void roof_fill_amx(struct kernel_ops *ops);
void outer_fill_amx(struct kernel_ops *ops);

#ifdef CADRE_AMX_MODEL /* amx with the tiles in software, for tests */
void product_fill_amxmodel(struct kernel_ops *ops);
void attention_fill_amxmodel(struct kernel_ops *ops);
void norm_fill_amxmodel(struct kernel_ops *ops);
void pointwise_fill_amxmodel(struct kernel_ops *ops);
void router_fill_amxmodel(struct kernel_ops *ops);
void loss_fill_amxmodel(struct kernel_ops *ops);
void box_fill_amxmodel(struct kernel_ops *ops);
void adamw_fill_amxmodel(struct kernel_ops *ops);
void roof_fill_amxmodel(struct kernel_ops *ops);
void outer_fill_amxmodel(struct kernel_ops *ops);
#endif
#endif
