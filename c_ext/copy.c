#include "copy.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>

#define LINE 64

void copy_past_cache(void *to, const void *from, size_t length) {
    unsigned char *out = to;
    const unsigned char *in = from;
    size_t head = -(uintptr_t)out % LINE;
    if (length < 4 * LINE) {
        memcpy(out, in, length);
        return;
    }
    memcpy(out, in, head);
    out += head, in += head, length -= head;
    for (; length >= LINE; length -= LINE, out += LINE, in += LINE) {
        __m128i words[LINE / sizeof(__m128i)];
        for (size_t i = 0; i < LINE / sizeof(__m128i); i++)
            words[i] = _mm_loadu_si128((const __m128i *)in + i);
        for (size_t i = 0; i < LINE / sizeof(__m128i); i++)
            _mm_stream_si128((__m128i *)out + i, words[i]);
    }
    /* Others are told of the copy by a lock, which does not wait for such stores. */
    _mm_sfence();
    memcpy(out, in, length);
}

#else

void copy_past_cache(void *to, const void *from, size_t length) {
    memcpy(to, from, length);
}

#endif
