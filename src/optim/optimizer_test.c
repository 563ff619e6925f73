#include "optim/optimizer.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static void assert_near(double a, double b) {
    if (!(fabs(a - b) <= 1e-12 * fmax(1, fabs(b))))
        fail_msg("%.17g is not %.17g", a, b);
}

static void test_cosine(void **state) {
    (void)state;
    struct optimizer_settings s;
    optimizer_settings_init(&s);
    s.lr = 2;
    s.warmup_steps = 10;
    s.min_lr_ratio = 0.1;
    assert_near(optimizer_lr(&s, 5, 110), 1);
    assert_near(optimizer_lr(&s, 10, 110), 2);
    assert_near(optimizer_lr(&s, 60, 110), 2 * 0.55);
    assert_near(optimizer_lr(&s, 110, 110), 0.2);
    assert_near(optimizer_lr(&s, 500, 110), 0.2);
}

static void test_warmup_stable_decay(void **state) {
    (void)state;
    struct optimizer_settings s;
    optimizer_settings_init(&s);
    s.lr = 1;
    s.warmup_steps = 0;
    s.schedule = OPTIMIZER_WSD;
    s.decay_share = 0.25;
    s.min_lr_ratio = 0;
    assert_near(optimizer_lr(&s, 1, 100), 1);
    assert_near(optimizer_lr(&s, 75, 100), 1);
    assert_near(optimizer_lr(&s, 90, 100), 0.4);
    assert_near(optimizer_lr(&s, 100, 100), 0);
}

static void test_clip(void **state) {
    (void)state;
    struct optimizer_settings s;
    optimizer_settings_init(&s);
    s.clip = 2;
    assert_near(optimizer_clip_scale(&s, 1.5), 1);
    assert_near(optimizer_clip_scale(&s, 8), 0.25);
    s.clip = 0;
    assert_near(optimizer_clip_scale(&s, 1e9), 1);
}

/* Two updates of one number, worked out from the definition. */
static void test_adamw_by_hand(void **state) {
    (void)state;
    double w = 1, g = 0.5, m = 0, v = 0, expected = 1, em = 0, ev = 0;
    struct tensor tw = tensor_1d(&w, DTYPE_F64, 1), tg = tensor_1d(&g, DTYPE_F64, 1);
    struct tensor tm = tensor_1d(&m, DTYPE_F64, 1), tv = tensor_1d(&v, DTYPE_F64, 1);
    struct optimizer_settings s;
    optimizer_settings_init(&s);
    s.warmup_steps = 0;
    s.schedule = OPTIMIZER_CONSTANT;
    s.lr = 0.1;
    s.weight_decay = 0.3;
    s.clip = 0.25; /* the norm of the gradient is 0.5: halved */
    for (int step = 1; step <= 2; step++) {
        kernels_ref()->adamw(tw, tg, tm, tv, optimizer_update_settings(&s, step, 10, 0.5, true),
                             (struct packed){0}, (struct update_hashes){0});
        em = s.beta1 * em + (1 - s.beta1) * 0.25;
        ev = s.beta2 * ev + (1 - s.beta2) * 0.0625;
        double mean = em / (1 - pow(s.beta1, step)), square = ev / (1 - pow(s.beta2, step));
        expected -= 0.1 * (mean / (sqrt(square) + s.epsilon) + 0.3 * expected);
        assert_near(w, expected);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cosine), cmocka_unit_test(test_warmup_stable_decay),
                                       cmocka_unit_test(test_clip), cmocka_unit_test(test_adamw_by_hand)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
