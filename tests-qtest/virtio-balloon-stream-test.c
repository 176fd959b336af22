/*
 * QTest test cases for virtio-balloon: migration streams that are damaged
 *
 * QEMU refuses a stream with a message, or what it has loaded does no harm.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-migration.h"
#include <glib/gstdio.h>

/* Types of the parts of a stream, see migration/savevm.c */
#define SECTION_FOOTER  0x7e
#define SUBSECTION      0x05

#define OPTIONS \
    ",free-page-hint=on,iothread=io0,free-page-reporting=on,deflate-on-oom=on"
#define NUM_PAGES       0x1234
#define ACTUAL          0x0abc
#define POISON          0x5a6b7c8d

static const Transport *transport;
static char *dir, *stream_path, *log_path;

/* A saved VM, with the positions of what is damaged */
typedef struct Stream {
    uint8_t *data;
    gsize size;
    /* The section of the balloon, from its type to its footer, inclusive */
    gsize section, end;
    /* Fields of virtio, in the order of virtio_save() */
    gsize status, features, config_len, queues, queue, stats_queue, queue_size;
    /* Fields of the balloon, and names of subsections */
    gsize num_pages, hints, poison, virtqueues, all_features;
} Stream;

static Balloon *src;
static Stream saved;

static void remove_files(void *opaque)
{
    g_unlink(stream_path);
    g_unlink(log_path);
    g_rmdir(dir);
}

/* The position of a string of bytes in the section */
static gsize find(const Stream *s, gsize from, const void *bytes, gsize len)
{
    for (gsize i = from; i + len <= s->end; i++) {
        if (!memcmp(s->data + i, bytes, len)) {
            return i;
        }
    }
    g_assert_not_reached();
}

/* The position after the name and the version of a subsection */
static gsize find_subsection(const Stream *s, const char *name)
{
    g_autofree char *text = g_strdup_printf("%c%c%s", SUBSECTION,
                                            (int)strlen(name), name);

    return find(s, s->section, text, strlen(text)) + strlen(text) + 4;
}

static void find_fields(Stream *s)
{
    static const char idstr[] = "/virtio-balloon";
    uint8_t bytes[8], footer[5] = { SECTION_FOOTER };
    gsize name, start;

    s->end = s->size;
    name = find(s, 0, idstr, strlen(idstr));
    start = name + strlen(idstr);
    /* The length of the name is in front of it. */
    for (gsize i = name; s->data[i] != start - i - 1; i--) {
        name = i - 1;
    }
    /* Type and ID are in front of that, instance and version follow. */
    s->section = name - 5;
    g_assert_cmphex(s->data[s->section], ==, 4);
    memcpy(footer + 1, s->data + s->section + 1, 4);
    s->end = find(s, start, footer, sizeof(footer)) + sizeof(footer);

    stl_be_p(bytes, src->dev->features);
    s->features = find(s, start + 8, bytes, 4);
    s->status = s->features - 4;
    s->config_len = s->features + 4;
    s->queues = s->config_len + 4 + ldl_be_p(s->data + s->config_len);
    g_assert_cmpint(ldl_be_p(s->data + s->queues), ==, src->num_queues);
    s->queue = s->queues + 4;
    g_assert_cmpint(ldl_be_p(s->data + s->queue), ==, src->vq[0]->size);
    /* With MSI-X, the vector follows. */
    s->queue_size = ldl_be_p(s->data + s->queue + 14) == src->vq[1]->size ?
                    14 : 16;
    g_assert_cmpint(ldl_be_p(s->data + s->queue + s->queue_size), ==,
                    src->vq[1]->size);
    s->stats_queue = s->queue + SVQ * s->queue_size;

    stl_be_p(bytes, NUM_PAGES);
    stl_be_p(bytes + 4, ACTUAL);
    s->num_pages = find(s, s->queue, bytes, 8);
    s->hints = find_subsection(s, "virtio-balloon-device/free-page-report");
    s->poison = find_subsection(s, "virtio-balloon-device/page-poison");
    g_assert_cmphex(ldl_be_p(s->data + s->poison), ==, POISON);
    s->all_features = find_subsection(s, "virtio/64bit_features");
    s->virtqueues = find_subsection(s, "virtio/virtqueues");
}

static bool is_completed(QTestState *qts)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        qts, "{ 'execute': 'query-migrate' }");
    bool completed = !g_strcmp0(qdict_get_try_str(ret, "status"), "completed");

    qobject_unref(ret);
    return completed;
}

/* Save a VM whose device has done something on each queue. */
static void save(void)
{
    g_autofree char *uri = NULL;
    uint64_t mem;
    const uint8_t none[1] = { };

    dir = g_dir_make_tmp("virtio-balloon-XXXXXX", NULL);
    g_assert_nonnull(dir);
    stream_path = g_build_filename(dir, "stream", NULL);
    log_path = g_build_filename(dir, "log", NULL);
    qtest_add_abrt_handler(remove_files, NULL);
    uri = g_strdup_printf("file:%s", stream_path);

    src = balloon_start(transport, OPTIONS);
    mem = alloc_pages(src, 4);
    set_balloon(src, RAM_SIZE - (uint64_t)NUM_PAGES * PAGE);
    config_writel(src, CFG(actual), ACTUAL);
    config_writel(src, CFG(poison_val), POISON);
    send_pfns(src, IVQ, (uint32_t[]){ pfn(mem), pfn(mem) + 2 }, 2);
    send_pfns(src, DVQ, &(uint32_t){ pfn(mem) }, 1);
    submit(src, SVQ, put(src, none, sizeof(none)), sizeof(none), false);
    wait_used(src, src->reporting_vq,
              submit(src, src->reporting_vq, mem, PAGE, true));
    hint(src, mem);
    stop_vm(src);
    qtest_qmp_assert_success(
        src->qts, "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }", uri);
    WAIT_FOR(is_completed(src->qts));
    g_assert_true(g_file_get_contents(stream_path, (char **)&saved.data,
                                      &saved.size, NULL));
    find_fields(&saved);
}

/*
 * Damage
 */

typedef enum Result { ANY, REFUSED, LOADED } Result;

typedef struct Damage {
    const char *name;
    /* The field of Stream, as an offset, and what is added to the position */
    gsize field;
    int offset;
    /* The new value, which has this number of bytes */
    int bytes;
    uint64_t value;
    Result result;
} Damage;

#define FIELD(member)   offsetof(Stream, member)

static const Damage damages[] = {
    { "none", FIELD(section), 0, 0, 0, LOADED },

    /* The state of the balloon */
    { "num-pages-0", FIELD(num_pages), 0, 4, 0, LOADED },
    { "num-pages-all", FIELD(num_pages), 0, 4, RAM_SIZE / PAGE, LOADED },
    { "num-pages-more", FIELD(num_pages), 0, 4, RAM_SIZE / PAGE + 1 },
    { "num-pages-sign", FIELD(num_pages), 0, 4, 0x80000000 },
    { "num-pages-max", FIELD(num_pages), 0, 4, UINT32_MAX },
    { "actual-0", FIELD(num_pages), 4, 4, 0, LOADED },
    { "actual-all", FIELD(num_pages), 4, 4, RAM_SIZE / PAGE },
    { "actual-more", FIELD(num_pages), 4, 4, RAM_SIZE / PAGE + 1 },
    { "actual-max", FIELD(num_pages), 4, 4, UINT32_MAX },
    { "cmd-id-0", FIELD(hints), 0, 4, 0 },
    { "cmd-id-1", FIELD(hints), 0, 4, 1 },
    { "cmd-id-low", FIELD(hints), 0, 4, INT32_MAX },
    { "cmd-id-max", FIELD(hints), 0, 4, UINT32_MAX },
    { "hint-status-0", FIELD(hints), 4, 4, 0 },
    { "hint-status-1", FIELD(hints), 4, 4, 1 },
    { "hint-status-2", FIELD(hints), 4, 4, 2 },
    { "hint-status-3", FIELD(hints), 4, 4, 3 },
    { "hint-status-4", FIELD(hints), 4, 4, 4 },
    { "hint-status-max", FIELD(hints), 4, 4, UINT32_MAX },
    { "poison-max", FIELD(poison), 0, 4, UINT32_MAX, LOADED },
    { "poison-version", FIELD(poison), -4, 4, 2, REFUSED },
    { "poison-name", FIELD(poison), -5, 1, 'x', REFUSED },

    /* Fields of virtio */
    { "status-0", FIELD(status), 0, 1, 0 },
    { "status-no-driver-ok", FIELD(status), 0, 1, 0x0b },
    { "status-needs-reset", FIELD(status), 0, 1, 0x4f },
    { "status-failed", FIELD(status), 0, 1, 0x8f },
    { "status-max", FIELD(status), 0, 1, 0xff },
    { "isr", FIELD(status), 1, 1, 0xff },
    { "queue-sel", FIELD(status), 2, 2, 1023 },
    { "queue-sel-bad", FIELD(status), 2, 2, 1024, REFUSED },
    /* A subsection has all of the features. */
    { "features-0", FIELD(features), 0, 4, 0 },
    { "features-max", FIELD(features), 0, 4, UINT32_MAX },
    { "all-features-0", FIELD(all_features), 0, 8, 0 },
    { "all-features-low", FIELD(all_features), 4, 4, UINT32_MAX, REFUSED },
    { "all-features-max", FIELD(all_features), 0, 8, UINT64_MAX, REFUSED },
    { "config-len-0", FIELD(config_len), 0, 4, 0 },
    { "config-len-more", FIELD(config_len), 0, 4, 4096 },
    { "config-len-max", FIELD(config_len), 0, 4, UINT32_MAX, REFUSED },
    { "queues-0", FIELD(queues), 0, 4, 0 },
    { "queues-less", FIELD(queues), 0, 4, 4 },
    { "queues-more", FIELD(queues), 0, 4, 6 },
    { "queues-1024", FIELD(queues), 0, 4, 1024 },
    { "queues-bad", FIELD(queues), 0, 4, 1025, REFUSED },
    { "queues-max", FIELD(queues), 0, 4, UINT32_MAX, REFUSED },
    { "queue-num-0", FIELD(queue), 0, 4, 0, REFUSED },
    { "queue-num-odd", FIELD(queue), 0, 4, 3 },
    { "queue-num-bad", FIELD(queue), 0, 4, 1025, REFUSED },
    { "queue-num-max", FIELD(queue), 0, 4, UINT32_MAX, REFUSED },
    { "queue-desc-0", FIELD(queue), 4, 8, 0 },
    { "queue-desc-no-ram", FIELD(queue), 4, 8, 0xfffffff000 },
    { "queue-desc-max", FIELD(queue), 4, 8, UINT64_MAX },
    { "queue-vector", FIELD(queue), 14, 2, 0x1234, REFUSED },
    { "queue-avail-idx", FIELD(queue), 12, 2, 2 },
    { "queue-avail-idx-0", FIELD(queue), 12, 2, 0 },
    { "queue-avail-idx-wrap", FIELD(queue), 12, 2, 0x8000 },
    { "queue-avail-idx-max", FIELD(queue), 12, 2, 0xffff },
    { "stats-avail-idx", FIELD(stats_queue), 12, 2, 2 },
    { "stats-avail-idx-0", FIELD(stats_queue), 12, 2, 0 },
    { "stats-avail-idx-size", FIELD(stats_queue), 12, 2, 128 },
    { "stats-avail-idx-max", FIELD(stats_queue), 12, 2, 0xffff, REFUSED },
    { "ring-avail-0", FIELD(virtqueues), 0, 8, 0 },
    { "ring-avail-max", FIELD(virtqueues), 0, 8, UINT64_MAX },
    { "ring-used-0", FIELD(virtqueues), 8, 8, 0 },
    { "ring-used-max", FIELD(virtqueues), 8, 8, UINT64_MAX },
};

/* Where the section is cut off, or which part of it is repeated */
typedef enum Cut {
    CUT_TYPE, CUT_NAME, CUT_CONFIG, CUT_QUEUE, CUT_BALLOON, CUT_SUBSECTION,
    CUT_FOOTER, CUT_END, REPEAT, REPEAT_FIELDS, REMOVE_FOOTER, CUTS
} Cut;

static const char *const cut_names[CUTS] = {
    "cut-type", "cut-name", "cut-config", "cut-queue", "cut-balloon",
    "cut-subsection", "cut-footer", "cut-end", "repeat", "repeat-fields",
    "remove-footer",
};

static GByteArray *copy(gsize from, gsize to)
{
    return g_byte_array_append(g_byte_array_new(), saved.data + from,
                               to - from);
}

static void write_stream(GByteArray *bytes)
{
    g_assert_true(g_file_set_contents(stream_path, (const char *)bytes->data,
                                      bytes->len, NULL));
    g_byte_array_unref(bytes);
}

/* Whether QEMU has finished, with success or with an error */
static bool has_ended(QTestState *qts, bool *completed, char **error)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        qts, "{ 'execute': 'query-migrate' }");
    const char *status = qdict_get_try_str(ret, "status");
    bool ended = !g_strcmp0(status, "failed") ||
                 !g_strcmp0(status, "completed");

    *completed = !g_strcmp0(status, "completed");
    if (ended) {
        *error = g_strdup(qdict_get_try_str(ret, "error-desc"));
    }
    qobject_unref(ret);
    return ended;
}

/* Use the device as it was loaded. */
static void use_loaded(Balloon *b)
{
    QVirtioDevice *dev = src->dev;

    b->dev->features = dev->features;
    b->dev->features_negotiated = true;
    continue_vm(b);
    query_balloon(b);
    set_balloon(b, RAM_SIZE / 2);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 2 * SECOND);
    /* Rings that are bad break the device. */
    for (int i = 0; i < src->num_queues; i++) {
        src->vq[i]->vdev = b->dev;
        b->dev->bus->virtqueue_kick(b->dev, src->vq[i]);
        src->vq[i]->vdev = dev;
    }
    config_readl(b, CFG(num_pages));
    config_readl(b, CFG(free_page_hint_cmd_id));
    config_writel(b, CFG(actual), 1);
    qobject_unref(virtio_status(b));
    if (is_rust_device()) {
        qobject_unref(get_status(b));
    }
    stop_vm(b);
    continue_vm(b);
}

/* After a reset, nothing is left of what was loaded. */
static void check_reset(Balloon *b)
{
    uint64_t mem;

    balloon_restart(b, F_BALLOON);
    g_assert_false(is_broken_for_qmp(b));
    mem = alloc_pages(b, 3);
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
    send_pfns(b, DVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    wait_used(b, b->reporting_vq,
              submit(b, b->reporting_vq, mem, PAGE, true));
    hint(b, mem);
}

static void load(Result expected)
{
    g_autofree char *uri = g_strdup_printf("file:%s", stream_path);
    g_autofree char *options =
        g_strdup_printf(OPTIONS " -incoming defer 2>%s", log_path);
    g_autofree char *log = NULL, *error = NULL;
    Balloon *b = balloon_boot(transport, options);
    bool completed;

    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate-incoming',"
        " 'arguments': { 'uri': %s, 'exit-on-error': false } }", uri);
    WAIT_FOR(has_ended(b->qts, &completed, &error));
    if (expected != ANY) {
        g_assert_cmpint(completed, ==, expected == LOADED);
    }
    if (completed) {
        use_loaded(b);
        check_reset(b);
    }
    /* QEMU is still there. */
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'query-status' }");
    balloon_quit(b);
    g_assert_true(g_file_get_contents(log_path, &log, NULL, NULL));
    g_test_message("%s: %s; %s", completed ? "loaded" : "refused",
                   error ?: "", log);
    if (!completed) {
        /* query-migrate or stderr says why. */
        g_assert_true(*log || (error && *error));
    }
}

static void test_damage(const void *data)
{
    const Damage *damage = data;
    gsize position = *(gsize *)((char *)&saved + damage->field)
                     + damage->offset;
    GByteArray *bytes;

    if (damage->field == FIELD(queue) &&
        damage->offset + damage->bytes > saved.queue_size) {
        g_test_skip("the device does not have MSI-X");
        return;
    }
    bytes = copy(0, saved.size);
    for (int i = 0; i < damage->bytes; i++) {
        bytes->data[position + i] =
            damage->value >> (8 * (damage->bytes - 1 - i));
    }
    write_stream(bytes);
    load(damage->result);
}

static void test_cut(const void *data)
{
    const Cut cut = GPOINTER_TO_INT(data);
    const gsize positions[] = {
        [CUT_TYPE] = saved.section + 1,
        [CUT_NAME] = saved.section + 10,
        [CUT_CONFIG] = saved.config_len + 6,
        [CUT_QUEUE] = saved.queue + 6,
        [CUT_BALLOON] = saved.num_pages + 2,
        [CUT_SUBSECTION] = saved.poison - 10,
        [CUT_FOOTER] = saved.end - 5,
        [CUT_END] = saved.end,
    };
    GByteArray *bytes;

    switch (cut) {
    case REPEAT:
        bytes = copy(0, saved.end);
        g_byte_array_append(bytes, saved.data + saved.section,
                            saved.size - saved.section);
        break;
    case REPEAT_FIELDS:
        bytes = copy(0, saved.num_pages + 8);
        g_byte_array_append(bytes, saved.data + saved.num_pages,
                            saved.size - saved.num_pages);
        break;
    case REMOVE_FOOTER:
        bytes = copy(0, saved.end - 5);
        g_byte_array_append(bytes, saved.data + saved.end,
                            saved.size - saved.end);
        break;
    default:
        bytes = copy(0, positions[cut]);
    }
    write_stream(bytes);
    load(cut == REPEAT ? ANY : REFUSED);
}

int main(int argc, char **argv)
{
    int ret;

    g_test_init(&argc, &argv, NULL);
    /* The state of other transports has another format. */
    transport = pci_transport();
    if (!transport) {
        return g_test_run();
    }
    save();
    for (int i = 0; i < ARRAY_SIZE(damages); i++) {
        g_autofree char *path = g_strdup_printf(
            "virtio-balloon/stream/%s", damages[i].name);

        qtest_add_data_func(path, &damages[i], test_damage);
    }
    for (int i = 0; i < CUTS; i++) {
        g_autofree char *path = g_strdup_printf("virtio-balloon/stream/%s",
                                                cut_names[i]);

        qtest_add_data_func(path, GINT_TO_POINTER(i), test_cut);
    }
    ret = g_test_run();
    balloon_quit(src);
    qtest_remove_abrt_handler(NULL);
    remove_files(NULL);
    return ret;
}
