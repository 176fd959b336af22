# SPDX-License-Identifier: GPL-2.0-or-later
#
# A device that is passed through
'''A server for vfio-user with a PCI device that does nothing'''

import json
import os
import socket
import struct
import threading

(VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS,
 GET_IRQ_INFO, SET_IRQS, REGION_READ, REGION_WRITE) = range(1, 11)
RESET = 13

HEADER = struct.Struct('<HHIII')
REPLY, NO_REPLY, ERROR = 0x1, 0x10, 0x20
ENOTSUP = 95

# linux/vfio.h
NUM_REGIONS, NUM_IRQS = 9, 5
REGION_FLAGS_READ_WRITE = 3
CONFIG_REGION = 7
CONFIG_SIZE = 256
FLAGS_RESET_PCI = 3


class NullDevice(threading.Thread):
    '''The server; it ends when QEMU closes the connection.'''

    def __init__(self, path):
        super().__init__(daemon=True)
        self.config = bytearray(CONFIG_SIZE)
        # Vendor, device and class ID: a "null device" of Red Hat
        self.config[0:4] = struct.pack('<HH', 0x1b36, 0x0005)
        self.config[8:12] = struct.pack('<I', 0xff000000)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)

    def run(self):
        conn, _ = self.listener.accept()
        with conn, self.listener:
            while self.serve(conn):
                pass

    @staticmethod
    def receive(conn, size):
        '''Receive a part of a message, and ignore file descriptors.'''
        data = b''
        while len(data) < size:
            part, fds, _, _ = socket.recv_fds(conn, size - len(data), 16)
            for fd in fds:
                os.close(fd)
            if not part:
                return None
            data += part
        return data

    def serve(self, conn):
        '''Answer a request.'''
        header = self.receive(conn, HEADER.size)
        if header is None:
            return False
        number, command, size, flags, _ = HEADER.unpack(header)
        payload = self.receive(conn, size - HEADER.size)
        if payload is None:
            return False
        answer = self.answer(command, payload)
        if not flags & NO_REPLY:
            error = 0
            flags = REPLY
            if answer is None:
                error, answer, flags = ENOTSUP, b'', REPLY | ERROR
            conn.sendall(HEADER.pack(number, command,
                                     HEADER.size + len(answer), flags, error)
                         + answer)
        return True

    def answer(self, command, payload):
        '''The answer to a request, or None if it is not supported'''
        if command == VERSION:
            caps = json.dumps({'capabilities': {'max_msg_fds': 8}})
            return struct.pack('<HH', 0, 0) + caps.encode() + b'\0'
        if command in (DMA_MAP, DMA_UNMAP, SET_IRQS):
            return payload
        if command == RESET:
            return b''
        if command == GET_INFO:
            return struct.pack('<IIII', 16, FLAGS_RESET_PCI, NUM_REGIONS,
                               NUM_IRQS)
        if command == GET_REGION_INFO:
            index = struct.unpack_from('<I', payload, 8)[0]
            config = index == CONFIG_REGION
            return struct.pack('<IIIIQQ', 32,
                               REGION_FLAGS_READ_WRITE if config else 0,
                               index, 0, CONFIG_SIZE if config else 0, 0)
        if command == GET_IRQ_INFO:
            index = struct.unpack_from('<I', payload, 8)[0]
            return struct.pack('<IIII', 16, 0, index, 0)
        if command in (REGION_READ, REGION_WRITE):
            offset, _, count = struct.unpack_from('<QII', payload)
            place = slice(offset, offset + count)
            if command == REGION_WRITE:
                self.config[place] = payload[16:16 + count]
                return payload[:16]
            return payload[:16] + bytes(self.config[place])
        return None
