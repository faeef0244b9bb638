/* Copying large stretches of memory. */
#ifndef HPCFT_COPY_H
#define HPCFT_COPY_H

#include <stddef.h>

/* As memcpy(), without taking what is written into the caches: for what nobody reads soon. Twice
 * as fast where memory is what limits, for it need not be read before it is written. */
void copy_past_cache(void *to, const void *from, size_t length);

#endif
