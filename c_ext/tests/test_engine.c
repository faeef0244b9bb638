/* The engine without Python, to be run under the sanitizers: see ../Makefile. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "../crc32c.h"
#include "../engine.h"

#undef NDEBUG
#define CHUNK 65536u
#define FOR_EVER 60000000000ll

static const char *folder;
static unsigned seed = 1;

static unsigned below(unsigned limit) {
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) % limit;
}

static engine *make(unsigned depth, size_t chunks, uint64_t bandwidth) {
    engine_options options = {.pool = chunks * CHUNK,
                              .chunk = CHUNK,
                              .copiers = 2,
                              .movers = 3,
                              .depth = depth,
                              .bandwidth = bandwidth,
                              .niceness = 1};
    engine *e = NULL;
    assert(engine_new(&options, &e) == 0);
    return e;
}

static engine_file open_file(const char *name, int direct) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    engine_file file = {open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), -1};
    assert(file.buffered >= 0);
    if (direct)
        file.direct = open(path, O_RDWR | O_DIRECT);
    return file;
}

static void close_file(engine_file file) {
    close(file.buffered);
    if (file.direct >= 0)
        close(file.direct);
}

static unsigned char *some_bytes(size_t length) {
    unsigned char *bytes = malloc(length + 1);
    assert(bytes);
    for (size_t i = 0; i < length; i++)
        bytes[i] = (unsigned char)below(256);
    return bytes;
}

static job *begin(engine *e, int writing, const engine_file *files, uint32_t n_files,
                  const engine_extent *extents, size_t n_extents, int sync) {
    job *j = NULL;
    assert(job_begin(e, writing, files, n_files, extents, n_extents, sync, &j) == 0);
    return j;
}

#define EXTENTS 40

/* Extents of all sizes with gaps between them, written and read back. */
static void test_round_trip(unsigned depth, int direct) {
    static const unsigned sizes[] = {0, 1, 13, 4095, 4096, 5000, 65536, 70000, 300000};
    engine *e = make(depth, 6, 0);
    for (int trial = 0; trial < 8; trial++) {
        engine_file file = open_file("trip", direct);
        engine_extent out[EXTENTS], in[EXTENTS];
        uint64_t offset = below(9000);
        for (int i = 0; i < EXTENTS; i++) {
            unsigned length = sizes[below(9)];
            if (below(3) == 0)
                offset += below(9000);
            /* Where memory and file are aligned, it is read in place. */
            if (below(2))
                offset = (offset + ENGINE_PAGE - 1) / ENGINE_PAGE * ENGINE_PAGE;
            void *room = NULL;
            assert(posix_memalign(&room, below(4) ? ENGINE_PAGE : 16, length + 1) == 0);
            out[i] = (engine_extent){some_bytes(length), offset, length, 0, 0};
            in[i] = (engine_extent){room, offset, length, 0, 0};
            offset += length;
        }
        job *writes = begin(e, 1, &file, 1, out, EXTENTS, 1);
        assert(job_wait(writes, JOB_COPIED, FOR_EVER));
        assert(job_wait(writes, JOB_DONE, FOR_EVER));
        assert(job_failed(writes).number == 0);
        assert(job_look(writes).moved == job_look(writes).total);
        job *reads = begin(e, 0, &file, 1, in, EXTENTS, 0);
        assert(job_wait(reads, JOB_DONE, FOR_EVER));
        assert(job_failed(reads).number == 0);
        for (int i = 0; i < EXTENTS; i++) {
            uint32_t sum = crc32c_portable(0, out[i].memory, out[i].length);
            assert(memcmp(in[i].memory, out[i].memory, out[i].length) == 0);
            assert(job_checksum(writes, (size_t)i) == sum);
            assert(job_checksum(reads, (size_t)i) == sum);
            free(in[i].memory);
            free(out[i].memory);
        }
        job_free(writes);
        job_free(reads);
        close_file(file);
    }
    assert(engine_peak(e) <= 6 * CHUNK);
    engine_close(e);
}

/* Many jobs at once, some dropped at once, some cancelled. */
static void test_jobs_side_by_side(unsigned depth) {
    enum { JOBS = 12, LENGTH = 700000 };
    engine *e = make(depth, 4, 0);
    unsigned char *bytes = some_bytes(LENGTH);
    engine_file files[JOBS];
    for (int round = 0; round < 4; round++) {
        job *jobs[JOBS];
        for (int i = 0; i < JOBS; i++) {
            char name[32];
            snprintf(name, sizeof name, "side-%d", i);
            files[i] = open_file(name, i % 2);
            engine_extent extent = {bytes, (uint64_t)i * 100, LENGTH, 0, 0};
            jobs[i] = begin(e, 1, &files[i], 1, &extent, 1, 0);
        }
        job *readers[JOBS] = {NULL};
        for (int i = 0; i < JOBS; i++) {
            if (i % 4 == 1)
                job_cancel(jobs[i]);
            if (i % 4 == 2) {
                job_free(jobs[i]);
                jobs[i] = NULL;
            }
        }
        for (int i = 0; i < JOBS; i++) {
            if (!jobs[i])
                continue;
            assert(job_wait(jobs[i], JOB_DONE, FOR_EVER));
            int number = job_failed(jobs[i]).number;
            assert(number == 0 || (number == ECANCELED && i % 4 == 1));
            if (!number) {
                unsigned char *back = malloc(LENGTH);
                engine_extent extent = {back, (uint64_t)i * 100, LENGTH, 0, 0};
                readers[i] = begin(e, 0, &files[i], 1, &extent, 1, 0);
                assert(job_wait(readers[i], JOB_DONE, FOR_EVER));
                assert(memcmp(back, bytes, LENGTH) == 0);
                free(back);
                job_free(readers[i]);
            }
            job_free(jobs[i]);
        }
        for (int i = 0; i < JOBS; i++)
            close_file(files[i]);
    }
    free(bytes);
    engine_close(e);
}

/* Move all that is elsewhere, up to three chunks at a time; at most so many chunks. Returns how
 * many it was. */
static int ferry(job *j, int writing, unsigned char **there, int most) {
    loan *held[3];
    int count = 0, moved = 0, over = 0;
    while (!over && moved < most) {
        loan *lent = job_borrow(j, count ? 0 : FOR_EVER, &over);
        if (lent) {
            size_t length;
            unsigned char *memory = loan_memory(lent, &length);
            loan_piece p;
            for (size_t i = 0; loan_look(lent, i, &p); i++) {
                assert(p.place + (size_t)p.length <= length);
                if (writing)
                    memcpy(memory + p.place, there[p.extent] + p.begin, p.length);
                else
                    memcpy(there[p.extent] + p.begin, memory + p.place, p.length);
            }
            held[count++] = lent;
            moved++;
        }
        while (count == 3 || (count && !lent))
            job_give_back(held[--count]);
    }
    while (count)
        job_give_back(held[--count]);
    return moved;
}

/* What is in memory that the engine cannot reach, between other things. */
static void test_loans(unsigned depth) {
    static const unsigned sizes[] = {0, 1, 4095, 4096, 70000, 300000};
    engine *e = make(depth, 4, 0);
    engine_file file = open_file("lent", 1);
    for (int trial = 0; trial < 12; trial++) {
        engine_extent out[EXTENTS], in[EXTENTS];
        unsigned char *bytes[EXTENTS], *back[EXTENTS];
        uint64_t offset = below(9000);
        for (int i = 0; i < EXTENTS; i++) {
            unsigned length = sizes[below(6)];
            bytes[i] = some_bytes(length);
            back[i] = malloc(length + 1);
            int elsewhere = below(2) == 0;
            out[i] = (engine_extent){elsewhere ? NULL : bytes[i], offset, length, 0, elsewhere};
            elsewhere = below(2) == 0;
            in[i] = (engine_extent){elsewhere ? NULL : back[i], offset, length, 0, elsewhere};
            offset += length + (below(3) ? 0 : below(9000));
        }
        /* In every other trial one that is broken off first, from here or by being dropped. */
        for (int writing = 1; trial % 2 && writing >= 0; writing--) {
            job *broken = begin(e, writing, &file, 1, writing ? out : in, EXTENTS, 0);
            ferry(broken, writing, writing ? bytes : back, (int)below(6));
            if (below(2)) {
                int over;
                job_cancel(broken);
                assert(!job_borrow(broken, FOR_EVER, &over) && over);
                assert(job_wait(broken, JOB_DONE, FOR_EVER));
            }
            job_free(broken);
        }
        job *writes = begin(e, 1, &file, 1, out, EXTENTS, 0);
        ferry(writes, 1, bytes, 1 << 30);
        assert(job_wait(writes, JOB_COPIED, 0));
        assert(job_wait(writes, JOB_DONE, FOR_EVER) && !job_failed(writes).number);
        job *reads = begin(e, 0, &file, 1, in, EXTENTS, 0);
        ferry(reads, 0, back, 1 << 30);
        assert(job_wait(reads, JOB_DONE, FOR_EVER) && !job_failed(reads).number);
        for (int i = 0; i < EXTENTS; i++) {
            assert(memcmp(bytes[i], back[i], out[i].length) == 0);
            assert(job_checksum(writes, (size_t)i) == job_checksum(reads, (size_t)i));
            free(bytes[i]);
            free(back[i]);
        }
        job_free(writes);
        job_free(reads);
    }
    assert(engine_peak(e) <= 4 * CHUNK);
    /* Closed while chunks are lent. */
    unsigned char *bytes = some_bytes(900000);
    engine_extent extent = {NULL, 0, 900000, 0, 1};
    job *j = begin(e, 1, &file, 1, &extent, 1, 0);
    int over;
    loan *lent = job_borrow(j, FOR_EVER, &over);
    assert(lent);
    engine_close(e);
    assert(!job_borrow(j, FOR_EVER, &over) && over);
    job_give_back(lent);
    assert(job_wait(j, JOB_DONE, FOR_EVER));
    assert(job_failed(j).number == ECANCELED);
    job_free(j);
    free(bytes);
    close_file(file);
}

/* A file that may not grow further; one that is not open; one that is too short. */
static void test_failures(unsigned depth) {
    enum { LENGTH = 1000000 };
    engine *e = make(depth, 4, 0);
    unsigned char *bytes = some_bytes(LENGTH);
    engine_file file = open_file("limited", 1);
    engine_extent extent = {bytes, 0, LENGTH, 0, 0};
    struct rlimit before, limit;
    getrlimit(RLIMIT_FSIZE, &before);
    limit = before;
    limit.rlim_cur = 300000;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    job *j = begin(e, 1, &file, 1, &extent, 1, 1);
    assert(job_wait(j, JOB_COPIED, FOR_EVER));
    assert(job_wait(j, JOB_DONE, FOR_EVER));
    assert(job_failed(j).number == EFBIG);
    assert(strcmp(job_failed(j).doing, "write") == 0);
    job_free(j);
    setrlimit(RLIMIT_FSIZE, &before);

    j = begin(e, 0, &file, 1, &extent, 1, 0);
    assert(job_wait(j, JOB_DONE, FOR_EVER));
    assert(job_failed(j).number == ENODATA);
    job_free(j);
    close_file(file);

    engine_file two[2] = {open_file("good", 0), {-1, -1}};
    engine_extent extents[2] = {{bytes, 0, LENGTH, 0, 0}, {bytes, 0, LENGTH, 1, 0}};
    assert(job_begin(e, 1, two, 2, extents, 2, 1, &j) == EBADF);
    two[1].buffered = open("/dev/full", O_RDWR);
    j = begin(e, 1, two, 2, extents, 2, 1);
    assert(job_wait(j, JOB_DONE, FOR_EVER));
    assert(job_failed(j).number == ENOSPC);
    assert(job_failed(j).file == 1);
    job_free(j);
    close_file(two[0]);
    close_file(two[1]);
    free(bytes);
    engine_close(e);
}

/* The engine goes away at any moment; what was begun comes to an end all the same. */
static void test_closing(unsigned depth) {
    enum { LENGTH = 900000 };
    unsigned char *bytes = some_bytes(LENGTH);
    for (int trial = 0; trial < 30; trial++) {
        engine *e = make(depth, 3, trial % 3 ? 0 : 2000000);
        engine_file file = open_file("closing", trial % 2);
        engine_extent extent = {bytes, 0, LENGTH, 0, 0};
        job *j = begin(e, 1, &file, 1, &extent, 1, 1);
        usleep(below(3000));
        engine_close(e);
        if (trial % 5 == 0) {
            job_free(j);
        } else {
            assert(job_wait(j, JOB_DONE, FOR_EVER));
            assert(job_failed(j).number == 0 || job_failed(j).number == ECANCELED);
            job_free(j);
        }
        close_file(file);
    }
    free(bytes);
}

static void test_empty_jobs(void) {
    engine *e = make(0, 1, 0);
    engine_file file = open_file("empty", 0);
    engine_extent extent = {NULL, 0, 0, 0, 0};
    for (size_t n = 0; n < 2; n++) {
        job *j = begin(e, 1, &file, 1, &extent, n, 1);
        assert(job_wait(j, JOB_DONE, 0));
        assert(job_failed(j).number == 0);
        job_free(j);
    }
    close_file(file);
    engine_close(e);
}

static void test_checksum(void) {
    assert(crc32c(0, "123456789", 9) == 0xE3069283u); /* RFC 3720 has others; this is the usual */
    unsigned char zeros[32] = {0};
    assert(crc32c(0, zeros, 32) == 0x8A9136AAu); /* RFC 3720, B.4 */
    unsigned char *bytes = some_bytes(200000);
    for (int i = 0; i < 200; i++) {
        size_t begin = below(100), length = below(100000), middle = below((unsigned)length + 1);
        uint32_t whole = crc32c_portable(0, bytes + begin, length);
        uint32_t first = crc32c(0, bytes + begin, middle);
        assert(crc32c(0, bytes + begin, length) == whole);
        assert(crc32c(first, bytes + begin + middle, length - middle) == whole);
        uint32_t second = crc32c(0, bytes + begin + middle, length - middle);
        assert(crc32c_combine(first, second, length - middle) == whole);
    }
    free(bytes);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return 2;
    }
    folder = argv[1];
    crc32c_start();
    test_checksum();
    test_empty_jobs();
    for (unsigned depth = 0; depth <= 4; depth += 4) {
        test_round_trip(depth, 0);
        test_round_trip(depth, 1);
        test_jobs_side_by_side(depth);
        test_loans(depth);
        test_failures(depth);
        test_closing(depth);
    }
    usleep(100000); /* for the threads to leave, so that what they leave behind is seen */
    puts("ok");
    return 0;
}
