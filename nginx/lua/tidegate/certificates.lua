--- Certificates of hosts, served from here, and of what we show to peers: renewed without a reload.
--
-- Why: nginx reads certificates when it loads a configuration, and refuses the whole of it for one
-- that is missing. Here a host's certificate is looked up when a client connects, so a renewed file
-- counts within a second, and a broken one concerns its host alone. Once a second one worker looks
-- at the files of all hosts; a handshake looks at memory only.
--
-- What hosts there are is read from the site's own text: each `serve{…}` and `balance{…}` in it.

local json = require "tidegate.json"
local lock = require "tidegate.lock"
local material = require "tidegate.material"
local session = require "tidegate.session"
local site = require "tidegate.site"
local ssl = require "ngx.ssl"
local stapling = require "tidegate.stapling"
local store = require "tidegate.store"
local trust = require "tidegate.trust"
local x509 = require "tidegate.x509"

local ctl = ngx.shared.tidegate_ctl
local dict = ngx.shared.tidegate_certificates

local concat = table.concat
local exit = ngx.exit
local floor = math.floor
local gmatch = string.gmatch
local gsub = string.gsub
local ipairs = ipairs
local loadstring = loadstring
local min = math.min
local next = next
local ngx = ngx
local pairs = pairs
local pcall = pcall
local set_cert = ssl.set_cert
local set_priv_key = ssl.set_priv_key
local setfenv = setfenv
local sort = table.sort
local sub = string.sub
local timer_at = ngx.timer.at
local type = type
local verify_client = ssl.verify_client

local ERROR = ngx.ERROR
local LOCK = "certificates"
local VERIFY_DEPTH = 5
local SOON = 14 * 86400     -- seconds before its end at which a certificate is warned of …
local SHARE = 6             -- … or this part of its life, if that is less
local SERIALS = 2 ^ 32
local RELOAD_PAUSE = 10     -- seconds between reloads for changed CAs

local _M = {}

local hosts = {}            -- first name → entry
local backends = {}         -- id → entry
local swept = false


-- Arguments of the calls of `name` in a text: tables of strings, booleans and lists.
local function calls(texts, name)
    local list = {}
    for _, text in pairs(texts) do
        for arguments in gmatch(text, name .. "(%b())") do
            local chunk = loadstring("return " .. arguments)
            local ok, value
            if chunk then
                ok, value = pcall(setfenv(chunk, {}))
            end
            if ok and type(value) == "table" then
                list[#list + 1] = value
            end
        end
    end
    return list
end


local function host_calls(texts)
    return calls(texts, 'tidegate%.certificates"%]%.serve')
end


local function backend_calls(texts)
    return calls(texts, 'tidegate%.backends"%]%.balance')
end


local function host_entry(options)
    return {
        subject = "h" .. (options.names[1] or ""),
        names = options.names,
        options = options,
        pair = material.pair(options.certificate, options.key),
        client_ca = options.client_ca and material.ca(options.client_ca, "client_ca"),
        matched = {},
    }
end


local function backend_entry(options)
    return {
        subject = "b" .. options.id,
        options = options,
        pair = options.certificate ~= "" and material.pair(options.certificate, options.key),
        trust = options.trust ~= "" and options.trust,
    }
end


--- Notes what a configuration that is being loaded serves.
-- @param options `{state, untrusted, ca_bundle}`
-- @param texts its files, name to text
function _M.configure(options, texts)
    hosts, backends, swept = {}, {}, false
    for _, call in ipairs(host_calls(texts)) do
        local entry = host_entry(call)
        hosts[entry.subject] = entry
    end
    local cas = {}
    for _, call in ipairs(backend_calls(texts)) do
        local entry = backend_entry(call)
        backends[entry.subject] = entry
        if entry.trust then
            cas[entry.trust] = true
        end
    end
    trust.configure(options, cas)
end


--- Makes what nginx itself has to read before it tests a configuration.
-- @param texts its files, name to text
function _M.prepare(texts)
    local cas = {}
    for _, call in ipairs(backend_calls(texts)) do
        if call.trust ~= "" then
            cas[call.trust] = call.ca
        end
    end
    trust.prepare(cas)
end


--- Body of `ssl_certificate_by_lua` of a host. Where it has nothing to serve, the handshake fails.
-- @param options `{names, certificate, key, client_ca, staple}`: names of the host, paths of files;
--   `client_ca`, if any, is whom clients' certificates have to come from
function _M.serve(options)
    local subject = "h" .. (options.names[1] or "")
    local entry = hosts[subject]
    if not entry or entry.options.certificate ~= options.certificate
            or entry.options.key ~= options.key or entry.options.client_ca ~= options.client_ca then
        entry = host_entry(options)
        hosts[subject] = entry
    end
    local pair = material.open(entry.pair)
    if not pair then
        return exit(ERROR)
    end
    local ok, err = set_cert(pair.chain)
    if ok then
        ok, err = set_priv_key(pair.key)
    end
    if ok and entry.client_ca then
        local ca = material.open(entry.client_ca)
        if not ca then
            return exit(ERROR)
        end
        ok, err = verify_client(ca.chain, VERIFY_DEPTH)
        if ok then
            -- What was verified for this host must not be resumed for another one.
            ok, err = session.forbid_resumption()
        end
    end
    if not ok then
        ngx.log(ngx.ERR, "tidegate: certificate of ", options.names[1] or "the default server",
                ": ", err)
        return exit(ERROR)
    end
    if options.staple then
        stapling.staple(pair.number)
    end
end


--- What to show a peer.
-- @param options see `backends.balance`
-- @return whether it can be spoken to at all; certificate and key as nginx takes them, nil for none
function _M.backend(options)
    if options.trust ~= "" and trust.refused(options.trust) then
        return false
    end
    if options.certificate == "" then
        return true
    end
    local subject = "b" .. options.id
    local entry = backends[subject]
    if not entry then
        entry = backend_entry(options)
        backends[subject] = entry
    end
    local pair = material.open(entry.pair)
    if not pair then
        return false
    end
    if not pair.shown then
        pair.shown, pair.shown_key = "data:" .. pair.pem, "data:" .. pair.key_pem
    end
    return true, pair.shown, pair.shown_key
end


local function add(problems, reason, message, refused)
    problems[#problems + 1] = { reason = reason, message = message, refused = refused }
end


-- Which of the host's names the certificate is not for; asked once per certificate.
local function mismatches(entry, pair, number)
    if entry.matched.number ~= number then
        local list = {}
        for _, name in ipairs(entry.names) do
            if not x509.is_for(pair.chain, name) then
                list[#list + 1] = name
            end
        end
        entry.matched = { number = number, list = list }
    end
    return entry.matched.list
end


-- What is to be said of the pair that is served.
local function look_at_pair(entry, at, problems)
    local number = material.number(entry.pair)
    if entry.number ~= number then
        local pair = number and material.parse(entry.pair)
        entry.number = number
        if pair then
            entry.not_before, entry.not_after = pair.not_before, pair.not_after
            entry.wrong = entry.names and mismatches(entry, pair, number)
            entry.responder = entry.options.staple and stapling.responder(pair.pem)
        end
    end
    if not number then
        entry.not_after = nil
        return
    end
    local path = entry.options.certificate
    if at >= entry.not_after then
        add(problems, "certificate_expired", "the certificate " .. path .. " expired at "
            .. material.date(entry.not_after), false)
    elseif at < entry.not_before then
        add(problems, "certificate_not_yet_valid", "the certificate " .. path
            .. " is not valid before " .. material.date(entry.not_before), false)
    elseif entry.not_after - at < min(SOON, (entry.not_after - entry.not_before) / SHARE) then
        add(problems, "certificate_expires_soon", "the certificate " .. path .. " expires at "
            .. material.date(entry.not_after), false)
    end
    if entry.wrong and entry.wrong[1] then
        add(problems, "certificate_name_mismatch", "the certificate " .. path .. " is not for "
            .. concat(entry.wrong, ", "), false)
    end
    if entry.responder then
        stapling.look(number, entry.pair, entry.responder, at)
    end
end


-- Looks at the files of one host or identity, and notes what is wrong with them.
-- @return whether nginx has to read a CA anew
local function look(entry, at)
    local problems, reload = {}, false
    for _, item in ipairs({ entry.pair or nil, entry.client_ca or nil }) do
        material.refresh(item, at)
        local found = material.problem(item, at)
        if found then
            add(problems, found.reason, found.message, found.refused)
        end
    end
    if entry.pair then
        look_at_pair(entry, at, problems)
    end
    if entry.trust then
        local found, changed = trust.look(entry.trust, entry.options.ca)
        reload = changed
        if found then
            add(problems, found.reason, found.message, found.refused)
        end
    end
    local state = json.encode({
        not_after = entry.not_after and floor(entry.not_after), problems = json.array(problems),
    })
    if dict:get("s" .. entry.subject) ~= state then
        dict:safe_set("s" .. entry.subject, state)
        ctl:incr("certificates_serial", 1, 0)
    end
    return reload
end


local function reload_site(premature)
    if not premature then
        local ok, err = site.reload()
        if not ok then
            ngx.log(ngx.ERR, "tidegate: a changed CA could not be loaded: ", err)
        end
    end
end


-- Forgets what the sites before had.
local function sweep()
    local wanted, subjects = {}, {}
    for _, entries in ipairs({ hosts, backends }) do
        for subject, entry in pairs(entries) do
            subjects["s" .. subject] = true
            for _, item in ipairs({ entry.pair or nil, entry.client_ca or nil }) do
                wanted[item.id] = true
            end
        end
    end
    material.keep(wanted)
    for _, key in ipairs(dict:get_keys(0)) do
        if sub(key, 1, 1) == "s" and not subjects[key] then
            dict:delete(key)
            ctl:incr("certificates_serial", 1, 0)
        end
    end
end


local function look_at_all()
    if not swept then
        swept = true
        sweep()
    end
    local at, reload = ngx.time(), false
    for _, entries in ipairs({ hosts, backends }) do
        for _, entry in pairs(entries) do
            reload = look(entry, at) or reload
            store.breathe()
        end
    end
    if reload and ctl:add("trust_reload", 1, RELOAD_PAUSE) then
        timer_at(0, reload_site)
    end
end


--- Looks at all files, unless another worker is doing so or just has. Once a second in each worker.
function _M.check()
    if not next(hosts) and not next(backends) then
        return
    end
    local token = lock.acquire(LOCK, 0)
    if not token then
        return
    end
    local ok, err = true, nil
    if ngx.now() - (ctl:get("certificates_checked") or 0) >= 0.8 then
        ok, err = pcall(look_at_all)
        ngx.update_time()
        ctl:set("certificates_checked", ngx.now())
    end
    lock.release(LOCK, token)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: certificates: ", err)
    end
end


local function described(entry)
    local state = json.decode(dict:get("s" .. entry.subject) or "")
    local options = entry.options
    local item = {
        certificate = options.certificate, key = options.key,
        not_after = state and state.not_after,
        problems = json.array(state and state.problems),
        checked = state ~= nil,
    }
    if entry.names then
        item.host = entry.names[1] or ""
        item.client_ca = options.client_ca
        item.stapled = stapling.has(material.number(entry.pair))
    else
        item.backend = options.id
        item.ca = options.ca
    end
    return item
end


--- All certificates and what is wrong with them, for the admin API and the metrics.
-- @return lists of hosts and of identities towards peers
function _M.report()
    local lists = {}
    for index, entries in ipairs({ hosts, backends }) do
        local keys, list = {}, json.array()
        for subject in pairs(entries) do
            keys[#keys + 1] = subject
        end
        sort(keys)
        for _, subject in ipairs(keys) do
            list[#list + 1] = described(entries[subject])
            store.breathe()
        end
        lists[index] = list
    end
    return lists[1], lists[2]
end


--- A number that changes when anything in the report's problems does; 0 before the first look. A
-- worker that is shutting down reports on the site before, so its number is another.
function _M.serial()
    local changes = ctl:get("certificates_serial") or 0
    return changes > 0 and site.load_number() * SERIALS + changes or 0
end


local ESCAPES = { ["\\"] = "\\\\", ['"'] = '\\"', ["\n"] = "\\n" }


local function label(text)
    return (gsub(text, '[\\"\n]', ESCAPES))
end


--- Prints the metrics.
function _M.print_metrics()
    local served, peers = _M.report()
    local expiry, problems = {}, {}
    for _, list in ipairs({ served, peers }) do
        for _, item in ipairs(list) do
            local tag = item.host and 'host="' .. label(item.host) .. '",backend=""'
                or 'host="",backend="' .. label(item.backend) .. '"'
            if item.not_after then
                expiry[#expiry + 1] = "tidegate_certificate_expiry_timestamp_seconds{" .. tag
                    .. "} " .. item.not_after
            end
            for _, problem in ipairs(item.problems) do
                problems[#problems + 1] = "tidegate_certificate_problem{" .. tag .. ',reason="'
                    .. label(problem.reason) .. '"} 1'
            end
        end
    end
    for _, family in ipairs({
        { "certificate_expiry_timestamp_seconds", "gauge", "When the one in use expires.", expiry },
        { "certificate_problem", "gauge", "What is wrong with a certificate or CA.", problems },
    }) do
        local name, lines = "tidegate_" .. family[1], family[4]
        if lines[1] then
            ngx.print("# HELP ", name, " ", family[3], "\n# TYPE ", name, " ", family[2], "\n",
                      concat(lines, "\n"), "\n")
        end
    end
end


return _M
