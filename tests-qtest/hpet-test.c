/*
 * QTest test cases for the HPET
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest.h"

#define HPET_BASE       0xfed00000
#define HPET_CFG        0x10
#define HPET_CFG_LEGACY 0x2

#define PIT_COUNTER_0   0x40
#define PIT_CONTROL     0x43
#define PIT_IRQ         0

static void set_hpet_config(QTestState *qts, uint32_t value)
{
    qtest_writel(qts, HPET_BASE + HPET_CFG, value);
    g_assert_cmphex(qtest_readl(qts, HPET_BASE + HPET_CFG), ==, value);
}

/* The output is low, and rises after 16 ticks of the PIT */
static void start_pit(QTestState *qts)
{
    /* Counter 0, low and high byte, interrupt on terminal count */
    qtest_outb(qts, PIT_CONTROL, 0x30);
    qtest_outb(qts, PIT_COUNTER_0, 16);
    qtest_outb(qts, PIT_COUNTER_0, 0);
}

static void run_pit(QTestState *qts)
{
    qtest_clock_step(qts, 1000000);
}

/* The PIT is disconnected as long as the HPET replaces it. */
static void legacy_replacement(void)
{
    QTestState *qts = qtest_init("-machine pc,hpet=on");

    qtest_irq_intercept_in(qts, "ioapic");

    start_pit(qts);
    g_assert_false(qtest_get_irq(qts, PIT_IRQ));
    run_pit(qts);
    g_assert_true(qtest_get_irq(qts, PIT_IRQ));

    set_hpet_config(qts, HPET_CFG_LEGACY);
    g_assert_false(qtest_get_irq(qts, PIT_IRQ));
    start_pit(qts);
    run_pit(qts);
    g_assert_false(qtest_get_irq(qts, PIT_IRQ));

    /* Its output is high since some time, and is visible at once. */
    set_hpet_config(qts, 0);
    g_assert_true(qtest_get_irq(qts, PIT_IRQ));

    /* The same once more, with the output low */
    start_pit(qts);
    set_hpet_config(qts, HPET_CFG_LEGACY);
    set_hpet_config(qts, 0);
    g_assert_false(qtest_get_irq(qts, PIT_IRQ));
    run_pit(qts);
    g_assert_true(qtest_get_irq(qts, PIT_IRQ));

    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (qtest_has_machine("pc")) {
        qtest_add_func("hpet/legacy-replacement", legacy_replacement);
    }
    return g_test_run();
}
