/*
 * QTest test cases for the HPET
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest.h"

#define HPET_BASE       0xfed00000ULL
#define HPET_CFG        0x10
#define HPET_CFG_ENABLE 0x1
#define HPET_CFG_LEGACY 0x2
#define HPET_T0_CFG     0x100
#define HPET_T0_CMP     0x108
#define HPET_T0_ROUTE   0x110

#define HPET_TN_LEVEL   0x2
#define HPET_TN_ENABLE  0x4
#define HPET_TN_FSB     0x4000

#define PIT_COUNTER_0   0x40
#define PIT_CONTROL     0x43
#define PIT_IRQ         0

#define RAM             0x100000ULL

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

/* The PIT is disconnected while the HPET replaces it. */
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

    /* Its output has been high for some time, and is visible at once. */
    set_hpet_config(qts, 0);
    g_assert_true(qtest_get_irq(qts, PIT_IRQ));

    /* The same again, with the output low */
    start_pit(qts);
    set_hpet_config(qts, HPET_CFG_LEGACY);
    set_hpet_config(qts, 0);
    g_assert_false(qtest_get_irq(qts, PIT_IRQ));
    run_pit(qts);
    g_assert_true(qtest_get_irq(qts, PIT_IRQ));

    qtest_quit(qts);
}

/* The message of a timer writes to a register, which turns the HPET off. */
static void message_to_itself(const void *data)
{
    uint32_t type = GPOINTER_TO_UINT(data);
    QTestState *qts = qtest_init("-machine pc,hpet=on");

    qtest_writeq(qts, HPET_BASE + HPET_T0_ROUTE,
                 (HPET_BASE + HPET_CFG) << 32 | 0);
    qtest_writel(qts, HPET_BASE + HPET_T0_CFG,
                 HPET_TN_FSB | HPET_TN_ENABLE | type);
    qtest_writeq(qts, HPET_BASE + HPET_T0_CMP, 1000);
    set_hpet_config(qts, HPET_CFG_ENABLE);
    qtest_clock_step(qts, 100000000);
    g_assert_cmphex(qtest_readl(qts, HPET_BASE + HPET_CFG), ==, 0);

    /*
     * The timer can do so again, except if its interrupt was not acknowledged.
     * Then the interrupt is signaled as soon as the HPET is turned on, while
     * the C implementation holds a lock.
     */
    if (type & HPET_TN_LEVEL) {
        qtest_quit(qts);
        return;
    }
    qtest_writeq(qts, HPET_BASE + HPET_T0_CMP, 20000000);
    set_hpet_config(qts, HPET_CFG_ENABLE);
    qtest_clock_step(qts, 1000000000);
    g_assert_cmphex(qtest_readl(qts, HPET_BASE + HPET_CFG), ==, 0);
    qtest_quit(qts);
}

/* A message that a reset sends does not change registers that were reset. */
static void message_at_reset(void)
{
    QTestState *qts = qtest_init("-machine pc,hpet=on");

    qtest_writeq(qts, HPET_BASE + HPET_T0_ROUTE, RAM << 32 | 0x12345678);
    qtest_writel(qts, HPET_BASE + HPET_T0_CFG,
                 HPET_TN_FSB | HPET_TN_ENABLE | HPET_TN_LEVEL);
    qtest_writeq(qts, HPET_BASE + HPET_T0_CMP, 1000);
    set_hpet_config(qts, HPET_CFG_ENABLE);
    qtest_clock_step(qts, 100000000);
    g_assert_cmphex(qtest_readl(qts, RAM), ==, 0x12345678);

    /* The message is sent again, because the interrupt was not acknowledged. */
    qtest_writeq(qts, HPET_BASE + HPET_T0_ROUTE,
                 (HPET_BASE + HPET_CFG) << 32 | HPET_CFG_LEGACY);
    qtest_system_reset(qts);
    g_assert_cmphex(qtest_readl(qts, HPET_BASE + HPET_CFG), ==, 0);
    g_assert_cmphex(qtest_readl(qts, HPET_BASE + HPET_T0_CFG) &
                    (HPET_TN_FSB | HPET_TN_ENABLE | HPET_TN_LEVEL), ==, 0);
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (qtest_has_machine("pc")) {
        qtest_add_func("hpet/legacy-replacement", legacy_replacement);
        qtest_add_data_func("hpet/message/edge", GUINT_TO_POINTER(0),
                            message_to_itself);
        qtest_add_data_func("hpet/message/level",
                            GUINT_TO_POINTER(HPET_TN_LEVEL),
                            message_to_itself);
        qtest_add_func("hpet/message/reset", message_at_reset);
    }
    return g_test_run();
}
