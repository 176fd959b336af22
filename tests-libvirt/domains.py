# SPDX-License-Identifier: GPL-2.0-or-later
#
# What libvirt can put into a domain
'''Domains that differ in one thing each.'''

import os
import subprocess

PC = 'pc-i440fx-7.2'
Q35 = 'pc-q35-7.2'

# A name, and what is in <devices>; @DIR@ is for files of the guest, and @PORT@
# for what it listens on
DEVICES = {}

# A name, and what is in <domain> beside <devices>
SETTINGS = {}


def devices(prefix, template, **values):
    '''Add domains that differ in a word.'''
    for name, value in values.items():
        DEVICES[f'{prefix} {name}'] = template.replace('$', value)


def plain(names):
    '''Words that stand for themselves'''
    return {name.replace('-', '_'): name for name in names.split()}


DEVICES['nothing'] = ''
devices('video', "<video><model type='$'/></video>",
        **plain('vga cirrus vmvga qxl virtio bochs ramfb none'))
DEVICES['video virgl'] = (
    "<graphics type='egl-headless'/><video><model type='virtio'>"
    "<acceleration accel3d='yes'/></model></video>")
DEVICES['graphics vnc'] = "<graphics type='vnc' port='-1' autoport='yes'/>"
DEVICES['graphics vnc password'] = (
    "<graphics type='vnc' port='-1' autoport='yes' passwd='secret'/>")
DEVICES['graphics vnc websocket'] = (
    "<graphics type='vnc' port='-1' autoport='yes' websocket='-1'/>")
DEVICES['graphics vnc socket'] = (
    "<graphics type='vnc'><listen type='socket'/></graphics>")
DEVICES['graphics spice'] = "<graphics type='spice' autoport='yes'/>"
DEVICES['graphics spice options'] = (
    "<graphics type='spice' autoport='yes'><image compression='auto_glz'/>"
    "<jpeg compression='auto'/><zlib compression='auto'/>"
    "<streaming mode='filter'/><clipboard copypaste='no'/></graphics>")
DEVICES['graphics dbus'] = "<graphics type='dbus' p2p='yes'/>"
DEVICES['graphics headless'] = "<graphics type='egl-headless'/>"
devices('sound', "<sound model='$'/><audio id='1' type='none'/>",
        **plain('ich6 ich9 ac97 es1370 sb16 usb'))
devices('audio', "<sound model='ich6'/><audio id='1' type='$'/>",
        **plain('none alsa oss'))
DEVICES['audio file'] = (
    "<sound model='ich6'/><audio id='1' type='file' path='@DIR@/x.wav'/>")
DEVICES['audio spice'] = ("<graphics type='spice' autoport='yes'/>"
                          "<sound model='ich6'/><audio id='1' type='spice'/>")

devices('user network', "<interface type='user'><model type='$'/></interface>",
        **plain('virtio e1000 e1000e rtl8139 ne2k_pci pcnet vmxnet3'))
DEVICES['network mcast'] = (
    "<interface type='mcast'><source address='230.0.0.1' port='@PORT@'/>"
    "<model type='virtio'/></interface>")
DEVICES['network server'] = (
    "<interface type='server'><source address='127.0.0.1' port='@PORT@'/>"
    "<model type='virtio'/></interface>")
DEVICES['network udp'] = (
    "<interface type='udp'><source address='127.0.0.1' port='5556'>"
    "<local address='127.0.0.1' port='@PORT@'/></source>"
    "<model type='virtio'/></interface>")
DEVICES['network tap'] = (
    "<interface type='ethernet'><target dev='balloon%d'/>"
    "<model type='virtio'/><driver name='qemu'/></interface>")
DEVICES['network vhost'] = (
    "<interface type='ethernet'><target dev='balloon%d'/>"
    "<model type='virtio'/><driver name='vhost' queues='2'/></interface>")

DISK = ("<disk type='file' device='disk'><driver name='qemu' type='raw' $/>"
        "<source file='@DIR@/raw.img'/><target dev='vda' bus='virtio'/>"
        "</disk>")
for what, options in {
        'threads': "io='threads'",
        'native': "io='native' cache='none'",
        'io_uring': "io='io_uring'",
        'discard': "discard='unmap' detect_zeroes='unmap'",
        'copy on read': "copy_on_read='on'",
        'queues': "queues='2'",
        'writethrough': "cache='writethrough'"}.items():
    DEVICES[f'disk {what}'] = DISK.replace('$/>', options + '/>')
devices('disk on', "<disk type='file'><driver name='qemu' type='qcow2'/>"
        "<source file='@DIR@/qcow2.img'/><target dev='$/></disk>",
        virtio="vda' bus='virtio'", ide="hda' bus='ide'",
        scsi="sda' bus='scsi'", usb="sda' bus='usb'", sata="sda' bus='sata'")
DEVICES['disk throttled'] = (
    DISK.replace('$/>', '/>').replace(
        '</disk>', '<iotune><total_iops_sec>100</total_iops_sec></iotune>'
        '<serial>x</serial></disk>'))
DEVICES['cdrom'] = ("<disk type='file' device='cdrom'>"
                    "<driver name='qemu' type='raw'/>"
                    "<source file='@DIR@/raw.img'/>"
                    "<target dev='hdc' bus='ide'/><readonly/></disk>")
DEVICES['floppy'] = ("<disk type='file' device='floppy'>"
                     "<driver name='qemu' type='raw'/>"
                     "<source file='@DIR@/raw.img'/>"
                     "<target dev='fda' bus='fdc'/></disk>")
devices('SCSI', "<controller type='scsi' model='$'/>",
        **plain('virtio-scsi lsilogic lsisas1068 vmpvscsi'))
devices('USB', "<controller type='usb' model='$'/>",
        **plain('piix3-uhci ehci ich9-ehci1 nec-xhci qemu-xhci none'))
DEVICES['smartcard spicevmc'] = (
    "<graphics type='spice' autoport='yes'/>"
    "<smartcard mode='passthrough' type='spicevmc'/>")
DEVICES['smartcard tcp'] = (
    "<smartcard mode='passthrough' type='tcp'>"
    "<source mode='bind' host='127.0.0.1' service='@PORT@'/>"
    "<protocol type='raw'/></smartcard>")
DEVICES['redirection spicevmc'] = (
    "<graphics type='spice' autoport='yes'/>"
    "<controller type='usb' model='qemu-xhci'/>"
    "<redirdev bus='usb' type='spicevmc'/>")
DEVICES['redirection tcp'] = (
    "<controller type='usb' model='qemu-xhci'/>"
    "<redirdev bus='usb' type='tcp'>"
    "<source mode='bind' host='127.0.0.1' service='@PORT@'/>"
    "<protocol type='raw'/></redirdev>")
DEVICES['channel agent'] = (
    "<channel type='unix'>"
    "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>")
DEVICES['channel spicevmc'] = (
    "<graphics type='spice' autoport='yes'/><channel type='spicevmc'>"
    "<target type='virtio' name='com.redhat.spice.0'/></channel>")
DEVICES['channel vdagent'] = (
    "<graphics type='vnc' autoport='yes'/><channel type='qemu-vdagent'>"
    "<source><clipboard copypaste='yes'/></source>"
    "<target type='virtio' name='com.redhat.spice.0'/></channel>")
DEVICES['channel spiceport'] = (
    "<graphics type='spice' autoport='yes'/><channel type='spiceport'>"
    "<source channel='org.example.0'/>"
    "<target type='virtio' name='org.example.0'/></channel>")
devices('serial', "<serial $</serial>",
        pty="type='pty'>", null="type='null'>",
        file="type='file'><source path='@DIR@/serial.txt'/>",
        unix="type='unix'><source mode='bind' path='@DIR@/serial.sock'/>",
        tcp="type='tcp'><source mode='bind' host='127.0.0.1' "
        "service='@PORT@'/><protocol type='telnet'/>",
        udp="type='udp'><source mode='connect' host='127.0.0.1' "
        "service='2446'/>")
DEVICES['serial with log'] = (
    "<serial type='pty'><log file='/var/log/libvirt/qemu/serial.log'/>"
    "</serial>")
DEVICES['parallel'] = "<parallel type='null'/>"
DEVICES['console virtio'] = (
    "<console type='pty'><target type='virtio'/></console>")
devices('input', "<input type='$'/>",
        usb_tablet="tablet' bus='usb", usb_keyboard="keyboard' bus='usb",
        virtio_tablet="tablet' bus='virtio", virtio_mouse="mouse' bus='virtio")
DEVICES['tpm tis'] = ("<tpm model='tpm-tis'><backend type='emulator' "
                      "version='2.0'/></tpm>")
DEVICES['tpm crb'] = ("<tpm model='tpm-crb'><backend type='emulator' "
                      "version='2.0'/></tpm>")
devices('rng', "<rng model='virtio'><backend model=$</rng>",
        random="'random'>/dev/urandom</backend>", builtin="'builtin'/>")
devices('watchdog', "<watchdog model='$' action='reset'/>",
        **plain('i6300esb ib700'))
DEVICES['panic'] = "<panic model='isa'/>"
DEVICES['balloon'] = (
    "<memballoon model='virtio' autodeflate='on' freePageReporting='on'>"
    "<stats period='5'/><driver packed='on'/></memballoon>")
DEVICES['no balloon'] = "<memballoon model='none'/>"
DEVICES['shmem'] = ("<shmem name='balloon'><model type='ivshmem-plain'/>"
                    "<size unit='M'>4</size></shmem>")
devices('9p', "<filesystem type='mount' accessmode='$'>"
        "<source dir='@DIR@'/><target dir='x'/></filesystem>",
        **plain('passthrough mapped squash'))
DEVICES['crypto'] = ("<crypto model='virtio' type='qemu'>"
                     "<backend model='builtin' queues='1'/></crypto>")
DEVICES['vsock'] = "<vsock model='virtio'><cid auto='yes'/></vsock>"

MEMFD = "<memoryBacking><source type='memfd'/>$</memoryBacking>"
SETTINGS['memory memfd'] = MEMFD.replace('$', "<access mode='shared'/>")
SETTINGS['memory file'] = MEMFD.replace('memfd', 'file').replace('$', '')
SETTINGS['memory prealloc'] = MEMFD.replace(
    '$', "<allocation mode='immediate' threads='2'/>")
SETTINGS['memory not shared'] = (
    '<memoryBacking><nosharepages/></memoryBacking>')
SETTINGS['memory discard'] = MEMFD.replace('$', '<discard/>')
SETTINGS['NUMA binding'] = (
    "<numatune><memory mode='strict' nodeset='0'/></numatune>")
SETTINGS['NUMA preferred'] = (
    "<numatune><memory mode='preferred' nodeset='0'/></numatune>")
SETTINGS['NUMA cells'] = (
    "<cpu><topology sockets='2' dies='1' cores='1' threads='1'/><numa>"
    "<cell id='0' cpus='0' memory='128' unit='MiB'/>"
    "<cell id='1' cpus='1' memory='128' unit='MiB'/></numa></cpu>")
HOTPLUG = ("<maxMemory slots='4' unit='MiB'>2048</maxMemory><cpu><numa>"
           "<cell id='0' cpus='0-1' memory='256' unit='MiB'/></numa></cpu>")
SETTINGS['memory hotplug'] = HOTPLUG
SETTINGS['iothreads'] = '<iothreads>2</iothreads>'
SETTINGS['CPU maximum'] = "<cpu mode='maximum'/>"
SETTINGS['CPU model'] = "<cpu mode='custom'><model>Nehalem</model></cpu>"
SETTINGS['generation ID'] = '<genid/>'
SETTINGS['SMBIOS'] = (
    "<sysinfo type='smbios'><bios><entry name='vendor'>x</entry></bios>"
    "</sysinfo>")
SETTINGS['fw_cfg'] = (
    "<sysinfo type='fwcfg'><entry name='opt/org.example/x'>y</entry>"
    "</sysinfo>")
SETTINGS['timers'] = (
    "<clock offset='utc'><timer name='rtc' tickpolicy='catchup'/>"
    "<timer name='hpet' present='yes'/></clock>")
SETTINGS['power management'] = (
    "<pm><suspend-to-mem enabled='yes'/><suspend-to-disk enabled='no'/></pm>")
SETTINGS['features'] = (
    "<features><acpi/><apic/><pae/><vmcoreinfo state='on'/>"
    "<vmport state='off'/></features>")

# Those that need the other chipset: settings, and devices
Q35_DOMAINS = {
    'q35': ('', ''),
    'q35 SMM': ("<features><acpi/><smm state='on'/></features>", ''),
    'q35 IOMMU': (
        "<features><acpi/><apic/><ioapic driver='qemu'/></features>",
        "<iommu model='intel'><driver intremap='on'/></iommu>"),
    'q35 virtio-iommu': ('', "<iommu model='virtio'/>"),
    'q35 PCIe ports': ('', "<controller type='pci' index='0' "
                       "model='pcie-root'/>"
                       "<controller type='pci' model='pcie-root-port'/>"
                       "<controller type='pci' model='pcie-expander-bus'/>"
                       "<controller type='pci' model='dmi-to-pci-bridge'/>"),
    'q35 UEFI': ('', ''),
    'q35 virtiofs': (
        MEMFD.replace('$', "<access mode='shared'/>"),
        "<filesystem type='mount'><driver type='virtiofs'/>"
        "<source dir='@DIR@'/><target dir='x'/></filesystem>"),
    'q35 virtio-mem': (
        HOTPLUG, "<memory model='virtio-mem'><target>"
        "<size unit='MiB'>128</size><node>0</node>"
        "<block unit='MiB'>2</block><requested unit='MiB'>0</requested>"
        "</target></memory>"),
    'q35 DIMM': (HOTPLUG, "<memory model='dimm'><target>"
                 "<size unit='MiB'>128</size><node>0</node></target>"
                 "</memory>"),
}

DOMAINS = [*DEVICES, *SETTINGS, *Q35_DOMAINS]


def domain_xml(name, emulator, directory, port):
    '''A domain, whose files are in the given directory.'''
    for kind in ('raw', 'qcow2'):
        image = os.path.join(directory, f'{kind}.img')
        if not os.path.exists(image):
            subprocess.run(['qemu-img', 'create', '-q', '-f', kind, image,
                            '1440k'], check=True)
    settings, inner = Q35_DOMAINS.get(
        name, (SETTINGS.get(name, ''), DEVICES.get(name, '')))
    if '<features>' not in settings:
        settings += '<features><acpi/><apic/></features>'
    machine = Q35 if name in Q35_DOMAINS else PC
    firmware = "firmware='efi'" if name == 'q35 UEFI' else ''
    smbios = "<smbios mode='sysinfo'/>" if name == 'SMBIOS' else ''
    return f'''<domain type='qemu'>
  <name>compared</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os {firmware}>
    <type arch='x86_64' machine='{machine}'>hvm</type>{smbios}
  </os>
  {settings}
  <devices>
    <emulator>{emulator}</emulator>
    {inner.replace('@DIR@', directory).replace('@PORT@', str(port))}
  </devices>
</domain>
'''
